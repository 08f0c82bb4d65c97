"""The texts of a list of prompts: as token ids, and as strings."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lowrank.core.typing import Bind, PyTree, Tokenizer
from lowrank.data import encode
from lowrank.generation.generator import BATCH, Generator, Request, fit
from lowrank.generation.sampling import GREEDY, Sampling
from lowrank.generation.text_stream import TextStream
from lowrank.models import build_model


def generate(
    model: nn.Module,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
    batch_size: int = BATCH,
    bind: Bind | None = None,
) -> list[list[int]]:
    """The continuation of each prompt of token ids: up to `max_new` tokens, the last of them perhaps a stop token.

    At most `batch_size` texts are written at a time. A text depends on its own prompt and key alone. `rng` is one key,
    or one per prompt (None: `jax.random.key(0)`). `bind`, a method's, is applied to `params` with the prompts as its
    batch. Raises UserError for an empty prompt, and where a prompt + max_new exceed the model's positions.
    """
    keys = key_data(rng, len(prompts))
    requests = [Request(ids, max_new, tuple(stop_ids), sampling, key) for ids, key in zip(prompts, keys, strict=True)]
    texts: list[list[int]] = [[] for _ in prompts]
    for i, tokens in complete(model, params, requests, batch_size=batch_size, bind=bind):
        texts[i] = tokens
    return texts


def complete(
    model: nn.Module,
    params: PyTree,
    requests: Sequence[Request],
    *,
    batch_size: int = BATCH,
    bind: Bind | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """`(index of the request, tokens of its text)` as the texts end, those of the shortest prompts first."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
    if order:
        generator = Generator(model, params, fit(model.config, requests, batch_size), bind)
        for i, tokens in generator.complete([requests[i] for i in order]):
            yield order[i], tokens


def key_data(rng: jax.Array | None, rows: int) -> np.ndarray:
    """The data of `rows` keys: those of `rng` if it has one per row, else keys derived from the one that it is."""
    rng = jax.random.key(0) if rng is None else rng
    keys = rng if rng.ndim else jax.vmap(partial(jax.random.fold_in, rng))(np.arange(rows))
    return np.asarray(jax.random.key_data(keys))


def encode_prompt(tokenizer: Tokenizer, text: str, start: bool = True) -> list[int]:
    """The ids of a prompt, with `start` after the token that the tokenizer puts before a text.

    A chat template writes that token itself.
    """
    return encode.encode_pieces(tokenizer, [(text, False)], start)[0]


def texts(
    pretrained: Any,
    params: PyTree,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new: int = 64,
    batch_size: int = BATCH,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
    bind: Bind | None = None,
) -> list[str]:
    """The continuation of each prompt (a string, or all its token ids), in the given order, without what ended it.

    `pretrained` has `config` and `tokenizer`. A text ends with any of the `stop` strings or of `stop_ids`, which are
    the tokenizer's by default. See `generate` for all else.
    """
    tokenizer = pretrained.tokenizer
    stops = tuple(tokenizer.stop_ids if stop_ids is None else stop_ids)
    stream = TextStream(tokenizer, stop, stops)
    ends = stream.is_complete if stop else None
    ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    keys = key_data(rng, len(ids))
    requests = [Request(p, max_new, stops, sampling, key, ends) for p, key in zip(ids, keys, strict=True)]
    out = [""] * len(ids)
    model = build_model(pretrained.config)
    for i, tokens in complete(model, params, requests, batch_size=batch_size, bind=bind):
        out[i] = stream.text(tokens)
    return out
