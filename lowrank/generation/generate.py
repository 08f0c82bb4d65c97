"""Batched generation with a KV cache: one compiled program prefills the prompts and decodes until every row stops.

Shapes: B rows, T prompt positions (padded on the left), N new tokens, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank.core import sharding
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import BatchInfo, Bind, PyTree
from lowrank.data import encode
from lowrank.generation.prompt_batches import left_pad, padded
from lowrank.generation.sampling import Sampling, next_token
from lowrank.models import build_model, init_cache

BATCH = 32  # rows


def generate(
    model: nn.Module,
    params: PyTree,
    tokens_BxT: np.ndarray,
    segments_BxT: np.ndarray,
    *,
    max_new: int,
    stop_ids: Iterable[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: jax.Array | None = None,
    pad_id: int = 0,
    bind: Bind | None = None,
) -> jax.Array:
    """Continues each prompt by up to `max_new` tokens: `[B, max_new]` int32, with `pad_id` after a row's stop token.

    Prompts are padded on the left: `segments` is 1 on their tokens and 0 before. A row's stop token (any of
    `stop_ids`) is part of its result. Decoding ends as soon as every row has stopped. `bind`, a method's, is applied to
    `params` with the prompts as its batch. Sampling needs `rng`, one key or one key per row; a row's tokens depend on
    its key and prompt alone. Raises UserError when prompt + max_new exceed the model's positions, or for a setting out
    of range.
    """
    sampling = Sampling(float(temperature), int(top_k), float(top_p))
    _check_fit(model.config, np.sum(np.asarray(segments_BxT) > 0, axis=-1), max_new)
    if sampling.temperature > 0 and rng is None:
        raise UserError(f"temperature={temperature} samples, so it needs rng, a key from jax.random.key")
    keys_B = row_keys(jax.random.key(0) if rng is None else rng, len(tokens_BxT))
    stops = tuple(sorted({int(i) for i in stop_ids}))
    with sharding.mesh_context(params):
        return _generate(model, params, tokens_BxT, segments_BxT, keys_B, max_new, stops, sampling, pad_id, bind)[0]


def row_keys(rng: jax.Array, rows: int) -> jax.Array:
    """`[rows]` keys derived from one key; keys that are one per row already stay as they are."""
    return rng if rng.ndim else jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(rows))


def _check_fit(config: Any, lengths_B: np.ndarray, max_new: int) -> None:
    if max_new < 1:
        raise UserError(f"max_new={max_new} is below 1, the least number of new tokens")
    if min(lengths_B) < 1:
        raise UserError("a prompt is empty: generation needs at least one token to continue")
    if max(lengths_B) + max_new + config.num_virtual_tokens > config.max_length:
        virtual = f" + {plural(config.num_virtual_tokens, 'virtual token')}" if config.num_virtual_tokens else ""
        total = f"a prompt of {plural(max(lengths_B), 'token')}{virtual} + max_new={max_new}"
        raise UserError(f"{total} exceeds the model's {plural(config.max_length, 'position')}")


def lowered(
    model: nn.Module, params: PyTree, rows: int, length: int, max_new: int, stops: tuple[int, ...], **options: Any
) -> jax.stages.Lowered:
    """The program of `generate` for `rows` prompts of `length` positions, ready to compile: `params` may be shapes."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), rows))
    with sharding.mesh_context(params):
        return _generate.lower(model, params, tokens, tokens, keys, max_new, stops, Sampling(), **options)


@partial(jax.jit, static_argnames=("model", "max_new", "stops", "sampling", "pad_id", "bind"))
def _generate(model, params, tokens_BxT, segments_BxT, keys_B, max_new, stops, sampling, pad_id, bind=None):
    """`(tokens [B, N], the number of the N that were decoded before all rows had stopped)`."""
    B, T = tokens_BxT.shape
    tokens_BxT, segments_BxT = jnp.asarray(tokens_BxT, jnp.int32), jnp.asarray(segments_BxT, jnp.int32)
    params = bind(params, BatchInfo(segments_BxT), None) if bind else params
    variables = {"params": params}
    lengths_B = jnp.sum(segments_BxT > 0, axis=-1, dtype=jnp.int32)
    ones_Bx1 = jnp.ones((B, 1), jnp.int32)

    def last_logits(tokens, positions, segments, cache):
        h, cache = model.apply(variables, tokens, positions, segments, cache, method="features")
        return model.apply(variables, h[:, -1:], method="logits")[:, 0], cache

    def write(n, logits_BxV, out_BxN, done_B):
        drawn_B = next_token(logits_BxV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, n), sampling)
        token_B = jnp.where(done_B, pad_id, drawn_B)
        out_BxN = jax.lax.dynamic_update_slice(out_BxN, token_B[:, None], (0, n))
        return out_BxN, token_B, done_B | jnp.isin(drawn_B, jnp.asarray(stops, jnp.int32))

    def running(state):
        n, (_, _, done_B), _ = state
        return (n < max_new) & ~jnp.all(done_B)

    def step(state):
        n, (out_BxN, token_B, done_B), cache = state
        logits_BxV, cache = last_logits(token_B[:, None], (lengths_B + n - 1)[:, None], ones_Bx1, cache)
        return n + 1, write(n, logits_BxV, out_BxN, done_B), cache

    cache = init_cache(model.config, B, T + max_new)
    positions_BxT = jnp.maximum(jnp.cumsum(segments_BxT > 0, axis=-1, dtype=jnp.int32) - 1, 0)
    logits_BxV, cache = last_logits(tokens_BxT, positions_BxT, segments_BxT, cache)
    first = write(0, logits_BxV, jnp.full((B, max_new), pad_id, jnp.int32), jnp.zeros(B, bool))
    steps, (out_BxN, *_), _ = jax.lax.while_loop(running, step, (jnp.int32(1), first, cache))
    return out_BxN, steps


def texts(
    pretrained: Any,
    params: PyTree,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new: int = 64,
    batch_size: int = BATCH,
    stop_ids: Iterable[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: jax.Array | None = None,
    bind: Bind | None = None,
) -> list[str]:
    """The continuation of each prompt (a string, or all its token ids), in the given order, without its stop token.

    `pretrained` has `config` and `tokenizer`; `stop_ids` defaults to the tokenizer's. Prompts of similar length share a
    batch of at most `batch_size`, and a prompt's text does not depend on the other prompts. Raises UserError when a
    prompt + max_new exceed the model's positions, or for a setting out of range.
    """
    tokenizer, config = pretrained.tokenizer, pretrained.config
    model = build_model(config)
    stops = set(tokenizer.stop_ids if stop_ids is None else stop_ids)
    ids = [encode.encode_pieces(tokenizer, [(p, False)])[0] if isinstance(p, str) else list(p) for p in prompts]
    keys = None if rng is None else row_keys(rng, len(ids))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batch_size = _even(len(ids), batch_size)
    out = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        full = rows + rows[-1:] * (batch_size - len(rows))  # one program per length
        tokens, segments = left_pad(
            [ids[i] for i in full], tokenizer.pad_id, config.max_length - config.num_virtual_tokens
        )
        settings = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "pad_id": tokenizer.pad_id,
            "bind": bind,
        }
        drawn = None if keys is None else keys[np.asarray(full)]
        new = generate(model, params, tokens, segments, max_new=max_new, stop_ids=stops, rng=drawn, **settings)
        for i, row in zip(rows, np.asarray(new), strict=False):
            out[i] = tokenizer.decode(list(itertools.takewhile(lambda t: t not in stops, row.tolist())))
    return out


def largest_batch(lengths: Sequence[int], config: Any, batch_size: int = BATCH) -> tuple[int, int]:
    """`(rows, prompt positions)` of the largest batch that `texts` makes of prompts with these lengths."""
    return _even(len(lengths), batch_size), padded(max(lengths), config.max_positions - config.num_virtual_tokens)


def _even(count: int, batch_size: int) -> int:
    """The rows of each batch when `count` prompts are divided into as few batches as possible, all of one size."""
    return -(-count // -(-count // batch_size)) if count else 1
