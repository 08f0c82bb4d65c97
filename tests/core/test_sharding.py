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
    [
        ((-1, 1, 1), (8, 1, 1, 1)),
        ((2, -1, 2), (2, 2, 1, 2)),
        ((1, 4, 2), (1, 4, 1, 2)),
        ((1, 1, 1), (1, 1, 1, 1)),
        ((2, 1, 1, -1), (2, 1, 4, 1)),
        ((-1, 1, 2, 1, 2), (4, 1, 1, 2)),
    ],
)
def test_mesh_sizes_fill_the_devices(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ({"data": 16}, "as with mesh.data=8"),
        ({"data": 2, "fsdp": 2, "tensor": 3, "context": -1}, "their number"),
        ({"fsdp": 3}, "their number"),
        ({"data": 3, "tensor": 4, "num_slices": 3}, "as with mesh.data=2"),
        ({"fsdp": -1}, "one may be -1"),
        ({"data": 0}, "must be positive"),
        ({"fsdp": 16}, "as with mesh.fsdp=8"),
    ],
)
def test_mesh_sizes_that_do_not_fit_are_refused(sizes, remedy):
    with pytest.raises(UserError, match=f"mesh data=.*{remedy}"):
        sharding.make_mesh(**sizes)


class Chip:
    """A TPU of a slice, as far as a mesh asks for it."""

    platform, device_kind, process_index, coords = "tpu", "TPU v4", 0, (0, 0, 0)

    def __init__(self, slice_index=None, core_on_chip=0):
        self.id = self.core_on_chip = core_on_chip
        if slice_index is not None:  # a topology of one slice to compile for has none
            self.slice_index = slice_index


def test_the_data_axis_alone_spans_slices():
    devices = jax.devices()
    apart = sharding.make_mesh(data=4, tensor=2, num_slices=2).devices
    assert list(apart[:2].flat) == devices[:4]
    assert list(apart[2:].flat) == devices[4:]
    with pytest.raises(
        UserError, match=r"mesh.data=1 is not divisible by mesh.num_slices=2, .* multiple of 2, .*4 devi"
    ):
        sharding.make_mesh(data=1, fsdp=8, num_slices=2)
    with pytest.raises(UserError, match=r"mesh\.num_slices=3 does not divide 8 devices"):
        sharding.make_mesh(num_slices=3)
    with pytest.raises(UserError, match=r"mesh\.num_slices=1, but the devices are 2 slices: set it to 2"):
        sharding.make_mesh_of_devices([Chip(0), Chip(1), Chip(0), Chip(1)])
    with pytest.raises(UserError, match=r"mesh\.num_slices=2, but the devices are 1 slice: set it to 1"):
        sharding.make_mesh_of_devices([Chip(0)] * 4, num_slices=2)


def test_chips_of_two_devices_and_chips_that_know_no_slice_have_a_mesh():
    cores = [Chip(core_on_chip=0), Chip(core_on_chip=1)]
    assert sharding.make_mesh_of_devices(cores, data=1, tensor=2).devices.tolist() == [[[cores]]]


def test_a_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 4"):
        sharding.check_batch_shape(6, 16, 1, mesh)
    with pytest.raises(UserError, match=r"not divisible by 16, .* optim.accumulate 4"):
        sharding.check_batch_shape(8, 16, 4, mesh)
    assert sharding.check_batch_shape(8, 15, 2, mesh) is None
    with pytest.raises(UserError, match=r"data.seq_len 15 is not divisible by mesh.context 4, .*, such as 16"):
        sharding.check_batch_shape(8, 15, 1, sharding.make_mesh(2, context=4))


@pytest.mark.parametrize(
    ("sizes", "shards"), [((2, 2, 2), {(2, 4)}), ((2, 1, 2, 2), {(4, 2)}), ((1, 2, 1, 4), {(4, 1)})]
)
def test_a_global_batch_is_split_over_rows_and_tokens(sizes, shards):
    host = {"tokens": np.arange(32).reshape(8, 4), "labels": np.arange(8)}
    batch = sharding.make_global_batch(host, sharding.make_mesh(*sizes), {"tokens"})
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == shards
    jax.tree.map(np.testing.assert_array_equal, dict(batch), host)


def test_members_of_a_row_stay_together_while_their_tokens_are_split():
    x = {"tokens": np.arange(64).reshape(4, 2, 8)}
    batch = sharding.make_global_batch(x, sharding.make_mesh(2, context=4), {"tokens"})
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 2, 2)}


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
