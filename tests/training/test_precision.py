"""The policies of precision: the dtypes that they set, and what a step makes of them."""

import jax
import pytest

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.memory import advice
from lowrank.memory import shapes as abstract
from lowrank.training import build, config
from tests.support.tiny_runs import config_of


@pytest.mark.parametrize("name", config.PRECISIONS)
def test_a_policy_sets_both_dtypes_and_keeps_what_is_trained_wide(name, files):
    run = build.build_run(config_of(files, "rank=2", mesh__data=1, model__precision=name))
    dtypes = config.PRECISIONS[name]
    assert run.network.config.dtype == dtypes["dtype"]
    state = abstract.step_inputs(run).state
    frozen = {x.dtype.name for n, x in tree.named_leaves(run.shapes) if n in run.frozen and not n.endswith("scale")}
    assert frozen == {dtypes["param_dtype"]}
    assert {x.dtype.name for x in jax.tree.leaves(state.trained)} == {"float32"}
    changes = [option.changes for option in advice.possible_options(run, 0)]
    assert ({"model.precision": "bf16"} in changes) == (name != "bf16")
    assert not any("model.dtype" in change or "model.param_dtype" in change for change in changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__precision": "bf16-f32"}, "unknown model.precision 'bf16-f32' .*'bf16_f32'"),
        (
            {"model__precision": "bf16_f32", "model__dtype": "bfloat16"},
            "model.dtype=bfloat16 contradicts model.precision=bf16_f32, which sets it to float32",
        ),
    ],
)
def test_a_policy_that_is_unknown_or_contradicted_is_refused(settings, message, files):
    with pytest.raises(UserError, match=message):
        build.build_run(config_of(files, "rank=2", mesh__data=1, **settings))
