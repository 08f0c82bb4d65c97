"""NF4, FP4 and int8 agree with bitsandbytes: the codes to the bit, the decoded values to float32's last place."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lowrank.weights.quantized import codebook, double_quantization
from lowrank.weights.quantized.packing import unpack
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close

IN, OUT = 192, 96


def weight(dtype=torch.float32):
    """`[out, in]` as torch keeps it, with a block of zeros and constant ones."""
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02
    w[3], w[4], w[5, :64] = 0.0, 0.01, -0.5
    return w.to(dtype)


def ours(w, scheme, **options):
    kernel = jnp.asarray(w.float().numpy().T).astype(jnp.bfloat16 if w.dtype == torch.bfloat16 else jnp.float32)
    return jax.jit(SCHEMES[scheme](**options))(kernel)


def nibbles(packed):
    flat = packed.numpy().ravel()
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(OUT, IN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_and_values_of_four_bits(scheme, block, dtype):
    w = weight(dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=scheme)
    mine = ours(w, scheme, block=block)
    np.testing.assert_array_equal(unpack(mine.codes, 4, block).reshape(IN, OUT).T, nibbles(packed))
    np.testing.assert_array_equal(mine.scale.T.ravel(), state.absmax)
    theirs = bnb.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(np.asarray(mine.materialize(), np.float32).T, theirs.float())


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_double_quantization(scheme):
    w = weight()
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type=scheme)
    mine = ours(w, scheme, double=True)
    np.testing.assert_array_equal(double_quantization.dynamic_table(), state.state2.code)
    np.testing.assert_array_equal(unpack(mine.codes, 4, 64).reshape(IN, OUT).T, nibbles(packed))
    assert_close(mine.scale.offset, state.offset)  # a mean, which nobody sums in one order
    assert_close(mine.scale.second, state.state2.absmax)
    gap = np.asarray(mine.scale.codes).T.ravel().astype(int) - state.absmax.numpy()
    assert np.abs(gap).max() <= 1
    assert np.count_nonzero(gap) <= 1  # on the edge between two, where the mean's last place decides
    # With their mean and their magnitudes the values are theirs.
    codes = jnp.asarray(state.absmax.numpy().reshape(OUT, -1).T)
    second, offset = jnp.asarray(state.state2.absmax.numpy()), jnp.asarray(state.offset.numpy())
    scale = double_quantization.QuantizedScale(codes=codes, second=second, offset=offset)
    same = codebook.Codebook(**{**vars(mine), "scale": scale})
    assert_close(same.materialize().T, bnb.dequantize_4bit(packed, state))


def test_int8_by_output():
    w = weight()
    codes, absmax, _ = bnb.int8_vectorwise_quant(w.half())
    mine = ours(w.half().float(), "int8")
    assert_close(mine.scale[0] * 127, absmax)
    gap = np.asarray(mine.codes).T.astype(int) - codes.numpy()
    assert np.abs(gap).max() <= 1
    assert np.mean(gap != 0) < 1e-3  # halves, which float32 and float16 round apart
