"""The count of the bytes that a compiled TPU program moves, on a schedule whose bytes are counted by hand."""

from experiments.bench.hbm_bytes import hbm_bytes

# Ten trips: each copies rows to VMEM, takes a slice of the codes and updates a part of the result in place.
PROGRAM = """
HloModule m, is_scheduled=true

%slice_codes (p: u8[64,1280], i: s32[]) -> u8[64,128] {
  %p = u8[64,1280]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %s = u8[64,128]{1,0:T(8,128)S(1)} dynamic-slice(%p, %zero, %i), dynamic_slice_sizes={64,128}
}

%product (out: bf16[32,1280], i.1: s32[], x: bf16[32,64], w: u8[64,128]) -> bf16[32,1280] {
  %out = bf16[32,1280]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  %x = bf16[32,64]{1,0:T(8,128)S(1)} parameter(2)
  %w = u8[64,128]{1,0:T(8,128)S(1)} parameter(3)
  %zero.1 = s32[]{:T(128)} constant(0)
  %y = bf16[32,128]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %u = bf16[32,1280]{1,0:T(8,128)} dynamic-update-slice(%out, %y, %zero.1, %i.1)
}

%body (t: (s32[], bf16[32,1280], u8[64,1280], bf16[32,64])) -> (s32[], bf16[32,1280], u8[64,1280], bf16[32,64]) {
  %t = (s32[]{:T(128)}, bf16[32,1280]{1,0:T(8,128)}, u8[64,1280]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %old = bf16[32,1280]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %codes = u8[64,1280]{1,0:T(8,128)} get-tuple-element(%t), index=2
  %rows = bf16[32,64]{1,0:T(8,128)} get-tuple-element(%t), index=3
  %start = (bf16[32,64]{1,0:T(8,128)S(1)}, bf16[32,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%rows)
  %near = bf16[32,64]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = u8[64,128]{1,0:T(8,128)S(1)} fusion(%codes, %n), kind=kLoop, calls=%slice_codes
  %new = bf16[32,1280]{1,0:T(8,128)} fusion(%old, %n, %near, %part), kind=kOutput, calls=%product
  ROOT %next = (s32[]{:T(128)}, bf16[32,1280]{1,0:T(8,128)}, u8[64,1280]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)}) tuple()
}

%more (t.1: (s32[], bf16[32,1280], u8[64,1280], bf16[32,64])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[32,1280]{1,0:T(8,128)}, u8[64,1280]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)}) parameter(0)
  %n.1 = s32[]{:T(128)S(6)} get-tuple-element(%t.1), index=0
  %ten = s32[]{:T(128)S(6)} constant(10)
  ROOT %lt = pred[]{:T(512)S(6)} compare(%n.1, %ten), direction=LT
}

ENTRY %main (a: u8[64,1280], b: bf16[32,64]) -> bf16[32,1280] {
  %a = u8[64,1280]{1,0:T(8,128)} parameter(0)
  %b = bf16[32,64]{1,0:T(8,128)} parameter(1)
  %empty = bf16[32,1280]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %all = (s32[]{:T(128)}, bf16[32,1280]{1,0:T(8,128)}, u8[64,1280]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)}) tuple(%a, %b)
  %loop = (s32[]{:T(128)}, bf16[32,1280]{1,0:T(8,128)}, u8[64,1280]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)}) while(%all), condition=%more, body=%body
  %z = bf16[32,1280]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %twice = bf16[32,1280]{1,0:T(8,128)} add(%z, %z)
}
"""  # noqa: E501


def test_a_loop_counts_its_slices_and_updates_once_a_trip_and_nothing_in_vmem():
    rows, codes, result = 2 * 32 * 64, 64 * 1280, 2 * 32 * 1280
    assert hbm_bytes(PROGRAM) == 10 * rows + codes + result + 3 * result


SLICED = """
HloModule m, is_scheduled=true

ENTRY %main (a: f32[224,4096]) -> f32[56,4096] {
  %a = f32[224,4096]{1,0:T(8,128)} parameter(0)
  %start = ((f32[224,4096]{1,0:T(8,128)}), f32[56,4096]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:56], [0:4096]}
  %near = f32[56,4096]{1,0:T(8,128)S(1)} slice-done(%start)
  ROOT %twice = f32[56,4096]{1,0:T(8,128)} add(%near, %near)
}
"""  # noqa: E501


def test_a_slice_that_is_copied_to_vmem_counts_as_its_size():
    assert hbm_bytes(SLICED) == 2 * 4 * 56 * 4096
