import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.training import optimizer as optim
from lowrank.training.optimizer import OptimConfig

L, D, F, V = 3, 8, 16, 24
SHAPES = {
    "embed/embedding": ((V, D), P("tensor", "fsdp")),
    "layers/attn/q/kernel": ((L, D, D), P(None, "fsdp", "tensor")),
    "layers/attn/qkv/kernel": ((L, D, 3 * D), P(None, "fsdp", "tensor")),
    "layers/attn/o/kernel": ((L, D, D), P(None, "tensor", "fsdp")),
    "layers/attn/o/bias": ((L, D), P()),
    "layers/attn_norm/scale": ((L, D), P()),
    "layers/mlp/experts/up/kernel": ((L, 4, D, F), P(None, None, "fsdp", "tensor")),
    "layers/mlp/router/kernel": ((L, D, 4), P()),
    "top/mlp/down/kernel": ((L, F, D), P(None, "tensor", "fsdp")),
    "norm/scale": ((D,), P()),
    "head/kernel": ((D, V), P("fsdp", "tensor")),
    "head/dense/kernel": ((D, D), P()),
    "pooler/kernel": ((D, D), P()),
    "prompt/embedding": ((4, D), P()),
}


def _leaves(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_every_plain_leaf_gets_the_spec_of_its_name():
    mesh = sharding.make_mesh(2, 2, 2)
    got = sharding.parameter_shardings(_leaves({k: shape for k, (shape, _) in SHAPES.items()}), mesh)
    assert {name: s.spec for name, s in got.items() if s.spec != SHAPES[name][1] and any(s.spec)} == {}
    assert {name for name, s in got.items() if any(s.spec)} == {n for n, (_, spec) in SHAPES.items() if any(spec)}


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="'layers/router/w'"):
        sharding.parameter_shardings(_leaves({"layers/router/w": (L, D)}), sharding.make_mesh(8, 1, 1))


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = sharding.make_mesh(1, 4, 2)
    got = sharding.parameter_shardings(_leaves({"layers/attn/q/kernel": (L, 6, 4), "head/kernel": (4, 7)}), mesh)
    assert got["layers/attn/q/kernel"].spec == P(None, None, "tensor")
    assert got["head/kernel"].spec == P("fsdp", None)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2)), ((1, 1, 1), (1, 1, 1))],
)
def test_mesh_sizes_fill_the_devices(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("sizes", [(16, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 16, 1)])
def test_mesh_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="mesh data="):
        sharding.make_mesh(*sizes)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 4"):
        sharding.check_batch_size(6, 1, mesh)
    with pytest.raises(UserError, match=r"not divisible by 16, .* optim.accumulate 4"):
        sharding.check_batch_size(8, 4, mesh)
    assert sharding.check_batch_size(8, 2, mesh) is None


def test_a_global_batch_is_split_over_data_and_fsdp():
    batch = sharding.make_global_batch({"tokens": np.arange(32).reshape(8, 4)}, sharding.make_mesh(2, 2, 2))
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(32).reshape(8, 4))


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(),
        OptimConfig(weight_decay=0.1, lr_ratios=((".*/kernel", 2.0),)),
        OptimConfig(name="adafactor", args={"min_dim_size_to_factor": 4}),
    ],
)
def test_the_optimizer_state_follows_its_parameters(config):
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = _leaves({"layers/attn/q/kernel": (L, 8, 4), "norm/scale": (D,)}) | {"frozen": None}
    where = sharding.parameter_shardings(shapes, mesh)
    trained = jax.tree.map(lambda x, s: jax.device_put(jnp.ones(x.shape), s), shapes, where)
    optimizer = optim.build_optimizer(config, 10, trained)
    state = jax.eval_shape(optimizer.init, trained)
    got = sharding.optimizer_shardings(optimizer, state, trained, mesh)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(got), strict=True))
    assert all(s.spec == P(None, "fsdp", "tensor") for x, s in pairs if x.shape == (L, 8, 4))
    assert all(not any(s.spec) for x, s in pairs if x.shape != (L, 8, 4))
