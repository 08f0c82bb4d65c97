"""How a form's arrays lie on a mesh, and whether they decay, is what its fields declare, at any depth of nesting."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank import methods
from lowrank.core import sharding, tree
from lowrank.core.weight import KERNEL, Weight, form, frozen, materialize, trainable
from lowrank.training.optimizer import OptimConfig, optimizer_labels
from tests.support.weight_forms import FORMS

L, IN, OUT, RANK = 3, 12, 10, 4
BOTH = ("tensor", "fsdp")


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def specs(params, **sizes):
    """The spec of each leaf; empty where it is replicated."""
    got = tree.named_leaves(sharding.parameter_shardings(params, mesh_of(**sizes)))
    return {name: tuple(where.spec) if any(where.spec) else () for name, where in got}


def decays(trained, **config):
    labeled = optimizer_labels(OptimConfig(weight_decay=0.1, **config), trained)
    return {name: not label.endswith(":0.0") for name, label in tree.named_leaves(labeled)}


@form
class Toy(Weight):
    """A form that no other file knows: its columns are scaled by `gain`, and `left` and `free` lie beside them."""

    base: Weight | jax.Array = frozen(axes=KERNEL)
    gain: jax.Array = trainable(axes=("out",), decay=False)
    left: jax.Array = trainable(axes=("in", None))
    free: jax.Array = trainable()

    def materialize(self):
        return materialize(self.base) * self.gain[..., None, :]


def toy(base, *stack):
    gain, left, free = ((*stack, OUT), (*stack, IN, RANK), (*stack, 5))
    return Toy(base=base, gain=jnp.ones(gain), left=jnp.ones(left), free=jnp.ones(free))


def test_a_form_with_new_fields_is_sharded_and_decayed_as_it_declares():
    w = toy(FORMS["lora of nf4"](jax.random.key(0), jnp.ones((L, IN, OUT))), L)
    got = specs({"layers": {"attn": {"q": {"kernel": w}}}}, fsdp=2, tensor=2)
    name = "layers/attn/q/kernel"
    assert got[f"{name}/gain"] == (None, "tensor")  # 10 is no multiple of 4
    assert got[f"{name}/left"] == (None, "fsdp", None)
    assert got[f"{name}/free"] == ()
    assert got[f"{name}/base/a"] == (None, "fsdp", None)
    assert got[f"{name}/base/base/codes"][1:] == ("fsdp", "tensor")
    assert got[f"{name}/base/base/scale/second"] == ()
    trained, _ = tree.split(w, methods.trainable_mask(methods.Method(), {"kernel": w})["kernel"])
    assert decays({"layers": {"attn": {"q": {"kernel": trained}}}}) == {
        f"{name}/gain": False,
        f"{name}/left": True,
        f"{name}/free": True,
        f"{name}/base/a": True,
        f"{name}/base/b": True,
    }


@pytest.mark.parametrize(
    ("kernel", "shape", "a", "b"),
    [
        ("layers/attn/q/kernel", (L, 16, 32), (None, "fsdp", None), (None, None, BOTH)),
        ("layers/mlp/down/kernel", (L, 32, 16), (None, BOTH, None), (None, None, "fsdp")),
        ("layers/mlp/down/kernel", (L, 6, 16), (None, "tensor", None), (None, None, "fsdp")),  # 6 is no multiple of 4
        ("head/kernel", (16, 32), ("fsdp", None), (None, BOTH)),
        ("pooler/kernel", (16, 16), (), ()),  # a replicated kernel has replicated factors
    ],
)
def test_a_low_rank_factor_is_divided_over_fsdp_wherever_its_kernel_is(kernel, shape, a, b):
    *parents, leaf = kernel.split("/")
    params = {leaf: FORMS["lora"](jax.random.key(0), jnp.ones(shape))}
    for parent in reversed(parents):
        params = {parent: params}
    got = specs(params, fsdp=2, tensor=2)
    assert (got[f"{kernel}/a"], got[f"{kernel}/b"]) == (a, b)


def test_every_form_lies_within_its_arrays_dimensions():
    for name, make in FORMS.items():
        kernel = {"layers": {"mlp": {"up": {"kernel": make(jax.random.key(0), jnp.ones((L, IN, OUT)))}}}}
        where = sharding.parameter_shardings(kernel, mesh_of(fsdp=2, tensor=2))
        for (leaf, x), (_, s) in zip(tree.named_leaves(kernel), tree.named_leaves(where), strict=True):
            assert isinstance(s, NamedSharding), (name, leaf)
            assert len(s.spec) in (0, x.ndim), (name, leaf)


@pytest.mark.parametrize("sizes_of_axes", [{"fsdp": 16}, {"context": 16}, {"fsdp": 4, "context": 4}])
def test_the_adapter_of_an_8b_model_takes_a_sixteenth_on_each_of_16_chips(sizes_of_axes):
    width, keys, hidden, layers, rank = 4096, 1024, 14336, 32, 16
    sizes = {"attn/q": (width, width), "attn/k": (width, keys), "attn/v": (width, keys), "attn/o": (width, width)}
    sizes |= {"mlp/gate": (width, hidden), "mlp/up": (width, hidden), "mlp/down": (hidden, width)}
    held = whole = 0
    for name, (n_in, n_out) in sizes.items():
        room, part = name.split("/")
        shape = jax.ShapeDtypeStruct((layers, n_in, n_out), jnp.bfloat16)
        method = methods.build_method({"name": "lora", "rank": rank, "target": ".*"})
        base = {"layers": {room: {part: {"kernel": shape}}}}
        params = jax.eval_shape(lambda p, m=method: methods.attach(m, p, jax.random.key(0)), base)
        w = params["layers"][room][part]["kernel"]
        where = sharding.parameter_shardings(params, mesh_of(**sizes_of_axes))["layers"][room][part]["kernel"]
        for x, s in ((w.a, where.a), (w.b, where.b)):
            held += 4 * math.prod(s.shard_shape(x.shape))
            whole += 4 * x.size
    assert 167e6 < whole < 169e6
    assert held == whole / 16


def test_vectors_do_not_decay_in_a_stack_either():
    shapes = {
        "layers/attn/q/bias": (L, 8),
        "layers/attn/gain": (L, 8),
        "layers/mlp/experts/gain": (L, 4, 8),
        "layers/attn/q/kernel": (L, 8, 8),
        "norm/gain": (8,),
        "head/kernel": (8, 8),
    }
    trained = {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert [name for name, decay in decays(trained).items() if decay] == ["head/kernel", "layers/attn/q/kernel"]


def test_trained_token_rows_do_not_decay():
    w = FORMS["rows"](jax.random.key(0), jnp.ones((8, 4)))
    trained, _ = tree.split(w, methods.trainable_mask(methods.Method(), {"embedding": w})["embedding"])
    assert decays({"embed": {"embedding": trained}}) == {"embed/embedding/rows": False}


def test_a_pattern_of_the_config_exempts_leaves_of_forms_too():
    w = FORMS["lora"](jax.random.key(0), jnp.ones((L, IN, OUT)))
    trained, _ = tree.split(w, methods.trainable_mask(methods.Method(), {"kernel": w})["kernel"])
    params = {"layers": {"attn": {"q": {"kernel": trained}}}}
    assert decays(params, no_decay=".*/b") == {"layers/attn/q/kernel/a": True, "layers/attn/q/kernel/b": False}


def test_a_replicated_kernel_has_an_empty_spec():
    assert specs({"pooler": {"kernel": jnp.ones((4, 4))}}, fsdp=2) == {"pooler/kernel": ()}
    assert P() == sharding.replicated_sharding(mesh_of()).spec
