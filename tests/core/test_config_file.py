"""Overrides mean what they mean to `launch.main`."""

import pytest
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from lowrank.core import config_file
from lowrank.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
CONFIG = "configs/tiny.py"
WORDS = (
    "config.steps=3",
    "config.optim.lr=1",
    "config.optim.b_ratio=16",
    "config.method.rank=3",
    "config.method.target=layers/.*",
    "config.method.rslora=true",
    "config.model.name=123",
    'config.model.quantize={"name":"nf4","block":64}',
    "config.mesh.fsdp=-1",
    "config.data.infill.rate=0.9",
    "config.data.infill.sentinels=('<a>', '<b>', '<c>')",
)


def test_overrides_are_those_of_the_launcher():
    words = ["main", f"--config={CONFIG}", *(f"--{word}" for word in WORDS)]
    own = flags.FlagValues()
    options = {"flag_values": own, "sys_argv": words, "lock_config": False, "accept_new_attributes": True}
    theirs = config_flags.DEFINE_config_file("config", None, "", **options)  # as launch.main has it
    own["config"].parser = config_file.GroupParser([word.partition("=")[0] for word in WORDS])
    own(words)
    ours = config_file.load_config(CONFIG)
    for word in WORDS:
        config_file.override_value(ours, *word.split("=", 1))
    assert ours.to_dict() == theirs.value.to_dict()
    assert isinstance(ours.optim.lr, float)
    assert ours.data.infill.to_dict() == {"rate": 0.9, "sentinels": ("<a>", "<b>", "<c>")}


def test_a_group_that_is_none_becomes_one_and_a_value_does_not():
    config = ConfigDict({"data": {"infill": None}, "model": {"quantize": "nf4"}})
    config_file.override_value(config, "config.data.infill.rate", "0.9")
    assert config.data.infill.rate == 0.9
    with pytest.raises(UserError, match=r"config\.model\.quantize is not a group"):
        config_file.override_value(config, "config.model.quantize.block", "64")
    assert config_file.with_changes({"data": {"infill": None}}, {"data.infill.rate": 1}) == {
        "data": {"infill": {"rate": 1}}
    }


@pytest.mark.parametrize(
    ("name", "text", "culprit"),
    [
        ("config.methd.rank", "3", "'config.methd.rank' (did you mean 'config.method'?)"),
        ("config.steps.x", "3", "config.steps is not a group"),
        ("config.steps", "many", "config.steps=many is not of type int"),
    ],
)
def test_a_bad_override_names_itself(name, text, culprit):
    with pytest.raises(UserError) as error:
        config_file.override_value(config_file.load_config(CONFIG), name, text)
    assert culprit in str(error.value)


def test_a_changed_copy_leaves_the_config_alone():
    config = {"steps": 1, "method": {"name": "lora", "rank": 8}, "model": {"quantize": "nf4"}}
    copy = config_file.with_changes(config, {"method.rank": 4, "logits_chunk_tokens": 2})
    assert copy == {
        "steps": 1,
        "method": {"name": "lora", "rank": 4},
        "logits_chunk_tokens": 2,
        "model": {"quantize": "nf4"},
    }
    assert config["method"]["rank"] == 8
