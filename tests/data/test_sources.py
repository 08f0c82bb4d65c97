"""TFDS datasets without TensorFlow: names, splits, nested features, and datasets that cannot be had."""

import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

from lowrank.core.errors import UserError
from lowrank.data.sources import open_source
from lowrank.data.tfds_source import prepared


class TinyAnswers(tfds.core.GeneratorBasedBuilder):
    """Questions with nested answers, in two splits, one of them empty."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="short", version="2.0.0"),
        tfds.core.BuilderConfig(name="long", version="2.0.0"),
    ]

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answers": tfds.features.Sequence({"text": tfds.features.Text(), "start": np.int32}),
            "kind": tfds.features.ClassLabel(names=["who", "what"]),
            "score": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = [{"text": f"{self.builder_config.name} £{i}", "start": i}, {"text": "other", "start": 0}]
            yield i, {"question": f"q{i}", "answers": answers, "kind": "what" if i % 2 else "who", "score": 0.5}


def test_a_dataset_is_prepared_and_read_without_tensorflow(tmp_path):
    source = open_source("tfds:tiny_answers/long", "train", tmp_path)
    records = sorted((source[i] for i in range(len(source))), key=lambda r: r["question"])
    assert records[3] == {
        "question": "q3",
        "answers.text": ["long £3", "other"],
        "answers.start": [3, 0],
        "kind": "what",
        "score": 0.5,
    }
    assert set(source.fields) == set(records[3])
    assert source.labels("kind") == ("who", "what")
    assert source.labels("question") == ()
    assert "tensorflow" not in sys.modules


class TinyArchive(tfds.core.GeneratorBasedBuilder):
    """Reads an archive and a file as most text datasets of TFDS do, through `tf.io.gfile`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, archive, **kwargs):
        self._archive = archive
        super().__init__(**kwargs)

    def _info(self):
        features = {"text": tfds.features.Text(), "name": tf.string, "score": tf.int64, "yes": tf.bool}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        folder = dl_manager.extract(self._archive)
        members = dl_manager.iter_archive(self._archive)
        return {"train": self._generate_examples(folder), "test": self._read(members)}

    def _generate_examples(self, folder):
        for path in tf.io.gfile.glob(folder / "*.txt"):
            with tf.io.gfile.GFile(path) as file:
                yield path, {"text": tf.compat.as_text(file.read()), "name": "n", "score": 3, "yes": True}

    def _read(self, members):
        for name, file in members:
            yield name, {"text": file.read(), "name": name, "score": 4, "yes": False}


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_unpacked_and_read_without_tensorflow(tmp_path, kind):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text £{i}", encoding="utf-8")
    archive = shutil.make_archive(str(tmp_path / "texts"), kind, tmp_path / "in")
    builder = prepared("tiny_archive", tmp_path / "tfds", archive=archive)
    read = {name: builder.as_data_source(name) for name in ("train", "test")}
    for records in read.values():
        assert sorted(records[i]["text"].decode() for i in range(3)) == ["text £0", "text £1", "text £2"]
    assert (read["train"][0]["score"], bool(read["train"][0]["yes"])) == (3, True)
    assert "tensorflow" not in sys.modules


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Cannot do without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": tf.image.decode_png(b"")}


def test_a_dataset_that_needs_tensorflow_says_so(tmp_path):
    with pytest.raises(UserError, match=r"cannot prepare tiny_pictures: .*needs TensorFlow, for tf\.image"):
        open_source("tfds:tiny_pictures", "train", tmp_path)


def test_a_prepared_folder_is_read_by_its_path(tmp_path):
    by_name = open_source("tfds:tiny_answers/short:2.0.0", "train[25%:]", tmp_path)
    by_path = open_source(f"tfds:{tmp_path}/tiny_answers/short/2.0.0", "train[25%:]", tmp_path / "unused")
    assert len(by_path) == 6
    assert [by_path[i] for i in range(6)] == [by_name[i] for i in range(6)]
    assert by_path.identity == by_name.identity


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("bbc_new", "train", r"unknown dataset 'bbc_new' \(did you mean 'bbc_news'\?\)"),
        ("tiny_answers", "train", r"unknown dataset 'tiny_answers' \(did you mean 'tfds:tiny_answers'\?\)"),
        ("tfds:tiny_answer", "train", r"unknown dataset 'tfds:tiny_answer' \(did you mean 'tiny_answers'\?\)"),
        ("jsonl:", "train", "unknown dataset 'jsonl:'"),
        ("tfds:tiny_answers/shrt", "train", "cannot open tfds:tiny_answers/shrt: .*short"),
        ("tfds:tiny_answers:9.9.9", "train", r"cannot open tfds:tiny_answers:9.9.9: .*only: 2\.0\.0"),
        ("tfds:tiny_answers", "tset", r"no split 'tset' \(did you mean 'test'\?\); its splits: "),
        ("tfds:tiny_answers", "train[5:5]", r"tfds:tiny_answers \(train\[5:5\]\) is empty"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_name(tmp_path, spec, split, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, split, tmp_path)
    assert "\n" not in str(caught.value)
