"""On a mesh each device computes with its own rows and tokens, as a compiled training step shows."""

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
LENGTHS = [LENGTH // parts for parts in (1, 2, 4)]
MESHES = [
    {"data": 1, "fsdp": 4},
    {"data": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2},
    {"data": 1, "context": 4, "tensor": 2},
]


def compiled(files, mesh, model="llama", **changes):
    config = config_of(files, "rank=2", model, data__seq_len=LENGTH, data__batch_size=ROWS, **changes)
    config.mesh = {"tensor": 1, **mesh}
    run = build.build_run(config)
    inputs = shapes.step_inputs(run)
    return step.compile_step(run.step(run.optimizer()), inputs.state, inputs.frozen, inputs.batch).as_text()


def largest(text):
    """The size of the largest activation `[rows, tokens, features]` of a program, in values."""
    shapes = [map(int, shape) for shape in re.findall(r"= f32\[(\d+),(\d+),(\d+)\]", text)]
    return max(rows * tokens * width for rows, tokens, width in shapes if tokens in LENGTHS)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_no_device_has_the_activations_of_all_rows_and_tokens(files, mesh, model):
    changes = {"objective": "classification", "data__template": "{text}"} if model == "bert" else {}
    assert largest(compiled(files, mesh, model, **changes)) < ROWS // 2 * LENGTH * HIDDEN


def test_the_compiler_would_not_see_to_it_itself(files, monkeypatch):
    monkeypatch.setattr(sharding, "shard_tokens", lambda x: x)
    assert largest(compiled(files, MESHES[0])) == ROWS * LENGTH * HIDDEN


def test_rows_and_tokens_that_the_mesh_does_not_divide_are_left_to_the_compiler():
    auto, axes = (jax.sharding.AxisType.Auto,) * 3, ("data", "fsdp", "context")
    cases = {
        (8, 3): "P(('data', 'fsdp'), UNCONSTRAINED)",
        (6, 4): "P(UNCONSTRAINED, 'context')",
        (8, 4): "P(('data', 'fsdp'), 'context')",
        (6, 3): "",
    }
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 2), axes, axis_types=auto)):
        for shape, spec in cases.items():
            program = str(jax.make_jaxpr(sharding.shard_tokens)(jnp.zeros(shape)))
            assert re.findall(r"spec=(P.*\))\)", program) == ([spec] if spec else [])
