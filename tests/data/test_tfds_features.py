"""Laws of a dataset's features: only TFDS's own classes are read, so that a dataset runs no code."""

import json
import sys

import pytest
import tensorflow_datasets as tfds

from lowrank.core.errors import UserError
from lowrank.data import tfds_source
from lowrank.data.tfds_features import check_features

OTHERS = {
    "new": {"pythonClassName": "evil.Feature"},
    "snake": {"python_class_name": "evil.Feature"},
    "old": {"type": "evil.Feature", "content": {}},
    "nested": {"featuresDict": {"features": {"a": {"pythonClassName": "evil.Feature"}}}},
    "inside": {"jsonFeature": {"json": json.dumps({"type": "evil.Feature", "content": {}})}},
    "module of TFDS": {"pythonClassName": "tensorflow_datasets.scripts.evil.Text"},
    "number": {"pythonClassName": 5},
}


@pytest.mark.parametrize("features", OTHERS.values(), ids=OTHERS)
def test_another_class_is_named_and_not_imported(tmp_path, monkeypatch, features):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"features.json names the feature class .*, which is not one of tfds.features"):
        tfds_source.prepared(str(tmp_path), tmp_path)
    assert "evil" not in sys.modules


def test_the_classes_of_tfds_are_read(tmp_path):
    features = {"type": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["a", "b"])}
    nested = {**features, "answers": tfds.features.Sequence({"text": tfds.features.Text()})}
    tfds.features.FeaturesDict(nested).save_config(tmp_path)
    check_features(tmp_path)


def test_a_folder_without_a_dataset_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a dataset that TFDS prepared"):
        tfds_source.prepared(str(tmp_path), tmp_path)
