"""On a mesh each device computes with its own rows, as a compiled training step shows."""

import re

import jax
import jax.numpy as jnp
import pytest

from lowrank.core import sharding
from lowrank.memory import shapes
from lowrank.training import build, step
from tests.support.tiny_checkpoint import HIDDEN
from tests.support.tiny_runs import config_of

ROWS, LENGTH = 8, 24
MESHES = [{"data": 1, "fsdp": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


def compiled(files, mesh, model="llama", **changes):
    config = config_of(files, "rank=2", model, data__seq_len=LENGTH, data__batch_size=ROWS, **changes)
    config.mesh = {"tensor": 1, **mesh}
    run = build.build_run(config)
    inputs = shapes.step_inputs(run)
    return step.compile_step(run.step(run.optimizer()), inputs.state, inputs.frozen, inputs.batch).as_text()


def largest(text):
    """The size of the largest activation `[rows, tokens, features]` of a program, in values."""
    return max(int(b) * int(f) * LENGTH for b, f in re.findall(rf"= f32\[(\d+),{LENGTH},(\d+)\]", text))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_no_device_has_the_activations_of_all_rows(files, mesh, model):
    changes = {"objective": "classification", "data__template": "{text}"} if model == "bert" else {}
    assert largest(compiled(files, mesh, model, **changes)) < ROWS // 2 * LENGTH * HIDDEN


def test_the_compiler_would_not_see_to_it_itself(files, monkeypatch):
    monkeypatch.setattr(sharding, "shard_batch_axis", lambda x: x)
    assert largest(compiled(files, MESHES[0])) == ROWS * LENGTH * HIDDEN


def test_rows_that_the_mesh_does_not_divide_are_left_to_the_compiler():
    whole, odd = jnp.zeros((8, 3)), jnp.zeros((6, 3))
    auto = (jax.sharding.AxisType.Auto,) * 2
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=auto)):
        for x, told in ((whole, True), (odd, False)):
            assert ("sharding_constraint" in str(jax.make_jaxpr(sharding.shard_batch_axis)(x))) is told
