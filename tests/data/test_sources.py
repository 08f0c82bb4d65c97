"""TFDS datasets without TensorFlow: names, splits, nested features, and datasets that cannot be had."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lowrank.data.sources import open_source
from lowrank.errors import UserError


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
