"""The collectives of a program are those that its loops run: counted on programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core import sharding
from lowrank.memory.collectives import Collective, collectives

# A loop of 3 trips, as a TPU's compiler prints it, around one that counts to 8 in steps of 2. Channel 7 starts outside
# of the inner loop and goes on inside of it. The last loop's bound is a value of its state.
TPU_TEXT = """HloModule m

%inner_body (p: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %step.1 = s32[4,64]{1,0} all-gather(%x), channel_id=7, dimensions={1}
  %send = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %done = bf16[4,8]{1,0} collective-permute-done(%send), metadata={op_name="a/add(b, c)"}
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="jit(f)/add"}
  ROOT %t = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%next, %done)
}

%inner_condition (p: (u32[], bf16[4,8])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %eight), direction=LT
}

%outer_body (p: (s32[], u32[], bf16[4,8])) -> (s32[], u32[], bf16[4,8]) {
  %p = (s32[], u32[], bf16[4,8]{1,0}) parameter(0)
  %start.1 = s32[4,64]{1,0} all-gather(%x), channel_id=7, dimensions={1}
  %loop = (u32[]{:T(128)}, bf16[4,8]{1,0}) while(%p), condition=%inner_condition, body=%inner_body
  ROOT %t = (s32[], u32[], bf16[4,8]{1,0}) tuple(%p, /*index=1*/%p, %loop)
}

%outer_condition (p: (s32[], u32[], bf16[4,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%chunk_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %sum = f32[10]{0} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %t = (s32[], s32[]) tuple(%p, %p)
}

%chunk_condition (p: (s32[], s32[])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %outer = (s32[], u32[], bf16[4,8]{1,0}) while(%t), condition=%outer_condition, body=%outer_body
  %chunks = (s32[], s32[]) while(%t), condition=%chunk_condition, body=%chunk_body
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%outer), index=2
}
"""


def test_loops_multiply_what_is_in_them():
    found = collectives(TPU_TEXT, chunks=5)
    assert found["collective-permute"] == Collective(3 * 4, 3 * 4 * 4 * 8 * 2)
    assert found["all-gather"] == Collective(3, 3 * 4 * 64 * 4)
    assert found["all-reduce"] == Collective(5, 5 * 10 * 4)
    assert found["all-to-all"] == found["reduce-scatter"] == Collective()


@pytest.mark.parametrize("layers", [1, 5])
def test_a_scan_over_sharded_kernels_gathers_each_once(layers):
    mesh = sharding.make_mesh(1, 8, 1)

    def f(kernels, x):
        whole = NamedSharding(mesh, PartitionSpec())
        gathered = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None)  # noqa: E731
        return jax.lax.scan(gathered, x, kernels)[0].sum()

    def shape(spec, *size):
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    program = jax.jit(f).lower(shape((None, "fsdp"), layers, 64, 64), shape(("fsdp",), 16, 64)).compile()
    found = collectives(program.as_text())
    assert found["all-gather"] == Collective(layers, layers * 64 * 64 * 4)
    assert found["all-reduce"] == Collective(1, 4)
