import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import common
from lowrank import data, methods
from lowrank.core import config_schema, sharding
from lowrank.core.errors import UserError
from lowrank.evaluation import evaluator
from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.objectives import build_objective
from lowrank.training import config, optimizer, stages
from lowrank.training.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))
MODEL_OPTIONS = {f.name for c in (DecoderConfig, EncoderConfig, config.ModelConfig) for f in dataclasses.fields(c)}

OWN_MEANING = {  # options that share a name with another method, but not its meaning
    ("rank", "vera"),
    ("rank", "galore"),
    ("target", "milora"),
    ("target", "ia3"),
    ("target", "esft"),
}


def _config(name: str, arg: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)


def _runs(name: str) -> list[Any]:
    """The configs of the runs that a config describes: its own, or those of its stages."""
    made = _config(name)
    return [stage.config for stage in stages.read_stages(made, "w")] if stages.STAGES in made else [made]


def test_there_is_a_config_for_each_main_job():
    assert {"smollm2_headlines", "minilm_bbc_classify", "llama_sft_jsonl", "tiny"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_group_of_a_config_fits_what_reads_it(name):
    for run in _runs(name):
        top = config_schema.call_with_group(config.RunConfig, run, "config")
        config_schema.call_with_group(evaluator.EvalConfig, top.eval, "eval")
        config_schema.call_with_group(config.CheckpointConfig, top.checkpoint, "checkpoint")
        config_schema.call_with_group(data.DataConfig, top.data, "data")
        assert build_objective(top.objective)
        optimizer.check_optimizer(config_schema.call_with_group(optimizer.OptimConfig, top.optim, "optim"), top.steps)
        assert methods.build_method(top.method)
        assert config_schema.call_with_group(sharding.make_mesh, top.mesh, "mesh").size == 8
        assert set(top.model) <= MODEL_OPTIONS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_any_method_as_its_argument(name):
    own = dict(_config(name).method)
    for method in methods.METHODS:
        config = _config(name, f"method={method}")
        assert methods.build_method(config.method)
        group, takes = dict(config.method), inspect.signature(methods.METHODS[method]).parameters
        shared = {key for key in own if key in takes and (key, method) not in OWN_MEANING}
        assert group == {"name": method, **{key: own[key] for key in shared}}
        left_out = [key for key in own if key not in group]
        assert len(config.notes) == bool(left_out)
        for note in config.notes:
            head, _, names = note.partition(" (")[0].partition(": ")
            assert (head, sorted(names.split(", "))) == (f"method {method} does not take", left_out)
    assert dict(_config(name, "method=dora,rank=3").method) == {**own, "name": "dora", "rank": 3}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_to_run_it(name):
    path = ROOT / "configs" / f"{name}.py"
    assert re.search(rf"(python -m|make) .*{name}", ast.get_docstring(ast.parse(path.read_text())))


def test_the_argument_is_parsed_as_literals_and_words():
    assert common.parse_argument("method=lora,rank=4,alpha=0.5,rslora=true,init=pissa") == {
        "method": "lora",
        "rank": 4,
        "alpha": 0.5,
        "rslora": True,
        "init": "pissa",
    }
    with pytest.raises(UserError, match="'rank' is not of the form KEY=VALUE"):
        common.parse_argument("rank")


def test_another_method_keeps_the_options_that_it_has_too():
    group = lambda *args, **options: common.method(*args, **options)["method"]  # noqa: E731
    assert group("alpha=2.0", "lora", rank=8) == {"name": "lora", "rank": 8, "alpha": 2.0}
    options = {"rank": 8, "target": "t", "dropout": 0.1, "init": "pissa", "also_train": "norm/scale"}
    assert group("method=bidora", "lora", **options) == {"name": "bidora", **options}
    assert "init" not in group("method=edora", "lora", **options)  # which its factors are not drawn by
    assert group("method=bitfit", "lora", **options) == {"name": "bitfit", "also_train": "norm/scale"}
    assert common.method("method=bitfit", "lora", rank=8)["notes"] == (
        "method bitfit does not take: rank (options of lora, the config's own method)",
    )


def test_an_unknown_option_that_is_asked_for_is_an_error_with_any_method():
    with pytest.raises(UserError, match=r"unknown config key 'method\.rank'"):
        methods.build_method(common.method("method=bitfit,rank=4", "lora", rank=8)["method"])
    with pytest.raises(UserError, match=r"unknown method 'dorra' \(did you mean 'dora'\?\)"):
        methods.build_method(common.method("method=dorra", "lora", rank=8)["method"])


def test_the_checkpoint_group_is_what_the_checkpointer_takes(tmp_path):
    group = config_schema.call_with_group(config.CheckpointConfig, {"every": 3, "keep": 1}, "checkpoint")
    with Checkpointer(tmp_path, every=group.every, keep=group.keep) as saver:
        assert saver.every == 3
