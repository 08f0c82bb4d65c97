"""Attention divided over the rows, the tokens and the heads of a mesh, beside attention on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.kernels.attention import context, dispatch, splash, splash_masks
from tests.kernels.test_attention import output_and_gradients
from tests.support import thinning
from tests.support.attention_cases import Case, mask_of
from tests.support.close import assert_close
from tests.support.tiny_models import normal

PACKED = ((0,) * 3 + (1,) * 6 + (2,) * 13 + (3,) * 10, (1,) * 32)
CASES = {
    "causal": Case(32),
    "packed, window, cap": Case(PACKED, window=7, cap=2.0),
    "prefix": Case(PACKED, prefix=5),
    "both directions": Case(PACKED, bidirectional=True),
    "tokens that do not divide": Case(9),
}


def mesh_of(data=1, parts=1, tensor=1):
    """A mesh of the first devices."""
    axes, sizes = ("data", "fsdp", "context", "tensor"), (data, 1, parts, tensor)
    devices = jax.devices()[: data * parts * tensor]
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * 4, devices=devices)


@pytest.mark.parametrize("form", thinning.leave(["dense", "blockwise"], ["dense"]))
@pytest.mark.parametrize("name", CASES)
def test_a_mesh_with_context_computes_what_one_device_computes(name, form):
    case = CASES[name]
    mask, mesh = mask_of(case), mesh_of(2, 2, 2)
    lengths = case.length, case.length + case.prefix
    q, k, v, g = (normal(i, 2, lengths[at], heads, 8) for i, (at, heads) in enumerate([(0, 4), (1, 2), (1, 2), (0, 4)]))
    alone = output_and_gradients(attend(mask, case, "dense"), q, k, v, g)
    divided = P("data", "context") if case.length % 4 == 0 else P("data")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, divided if x.shape[1] == 32 else P("data"))) for x in (q, k, v, g)
        ]
        shared = output_and_gradients(attend(mask, case, form), *placed)
    for ours, exact in zip(shared, alone, strict=True):
        assert_close(ours, exact, relative=2e-5, size=np.max(np.abs(exact)))


def test_splash_has_the_mask_of_the_queries_of_each_device():
    """Run by Pallas's interpreter."""
    case = Case(((0,) * 3 + (1,) * 250 + (2,) * 259,), window=200, local=True, cap=2.0)
    mask, mesh = mask_of(case), mesh_of(parts=2)
    q, k, v, g = (normal(i, 1, 512, heads, 8) for i, heads in enumerate((2, 1, 1, 2)))
    alone = output_and_gradients(attend(mask, case, "dense"), q, k, v, g)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data", "context"))) for x in (q, k, v, g)]
        form = partial(splash.attend, mask=mask, softcap=case.cap, interpret=True)
        shared = output_and_gradients(form, *placed)
    for ours, exact in zip(shared, alone, strict=True):
        assert_close(ours, exact, relative=2e-5, size=np.max(np.abs(exact)))


def attend(mask, case, form):
    """The operation as a function of `q`, `k` and `v`."""
    return lambda q, k, v: dispatch.attend(q, k, v, mask, softcap=case.cap, implementation=form)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_devices_exchange_their_chunks_so_that_each_has_equally_many_keys(parts):
    mesh = mesh_of(parts=parts)
    slots = jnp.arange(8 * parts)[None]
    spec = P(None, "context")
    balanced = jax.shard_map(context.balance, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(slots)
    each = np.asarray(balanced).reshape(parts, 2, 4)
    assert each[:, :, 0].tolist() == [[4 * i, 4 * (2 * parts - 1 - i)] for i in range(parts)]
    assert len(set(each.sum((1, 2)).tolist())) == 1
    restored = jax.shard_map(context.restore, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(balanced)
    assert np.array_equal(restored, slots)


def test_the_gradients_of_keys_are_scattered_and_no_device_holds_the_scores_of_a_row():
    mesh, T = mesh_of(parts=8), 4096
    at = NamedSharding(mesh, P(None, "context"))
    shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32, sharding=at)
    loss = lambda q, k, v: jnp.sum(attend(mask_of(Case(T)), Case(T), "blockwise")(q, k, v))  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(at, at, at)).lower(shape, shape, shape).compile()
    assert "reduce-scatter" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * T * T // 8  # two heads


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("window", [(), (24, 0), (3, None), (None, 40)])
def test_the_blocks_of_a_mask_are_those_of_all_its_scores_and_are_computed_only_where_they_differ(window, parts):
    T, block = 128, 16
    ours, theirs = (
        of.LocalMask((T, T), window, 0) if window else of.CausalMask((T, T)) for of in (splash_masks, splash_attention)
    )
    ours.q_sequence = theirs.q_sequence = context.balanced_slots(T, parts)
    alike = set()
    for q, k in np.ndindex(T // block, T // block):
        index = slice(q * block, (q + 1) * block), slice(k * block, (k + 1) * block)
        expected = theirs[index]
        assert np.array_equal(np.broadcast_to(ours[index], expected.shape), expected)
        alike.add((ours[index].size == 1, expected.all() or not expected.any()))
    assert alike == {(True, True), (False, False)}
