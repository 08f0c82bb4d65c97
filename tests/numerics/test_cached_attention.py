"""Attention to a cache beside float64, and the memory that a step takes beside it, as users compile them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.generation import generator, state
from lowrank.kernels.attention import cached
from tests.support.attention_cases import reference
from tests.support.close import assert_close
from tests.support.tiny_models import decoder, normal

B, K, H, LAYER = 3, 2, 6, 1
LENGTHS = np.array([0, 5, 600], np.int32)  # the last one is in three blocks, the last of which overlaps


@pytest.mark.parametrize(
    ("tokens", "groups", "window", "prefix", "cap"), [(1, 3, 0, 0, 0.0), (4, 1, 3, 2, 2.0), (2, 2, 300, 0, 0.0)]
)
def test_tokens_see_the_slots_of_their_own_row_and_each_other(tokens, groups, window, prefix, cap):
    S, N = 650, K * groups
    q, k, v = (normal(i, B, tokens, n, H) for i, n in enumerate((N, K, K)))
    keys, values = normal(3, 2, B, K, S, H), normal(4, 2, B, K, S, H)
    options = {"softcap": cap, "window": window, "prefix": prefix}
    attend = jax.jit(functools.partial(cached.attend, **options))
    out = attend(q, k, v, keys, values, jnp.int32(LAYER), LENGTHS)
    for b, n in enumerate(LENGTHS):
        rows = [np.concatenate([x[LAYER, b, :, :n].swapaxes(0, 1), y[b]])[None] for x, y in ((keys, k), (values, v))]
        slots, times = np.arange(n + tokens)[None], n + np.arange(tokens)[:, None]
        see = (slots <= times) & ((times - slots < window) | (slots < prefix) if window else True)
        want = reference(q[b : b + 1], *rows, np.zeros_like(q[b : b + 1]), see[None], H**-0.5, cap)[0]
        assert_close(out[b : b + 1], want)


def test_a_step_writes_the_cache_in_place_and_copies_no_more_than_a_block_of_it():
    model, params = decoder("llama")
    shapes = state.state_shapes(model, params, rows=4, slots=8192, max_new=16, stops=8)
    arguments = (model, None, params, shapes, np.int32(1), np.bool_(False))
    memory = generator.decode.lower(*arguments).compile().memory_analysis()
    cache = sum(x.size * 4 for x in jax.tree.leaves((shapes.cache.keys, shapes.cache.values)))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 16
