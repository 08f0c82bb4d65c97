"""Prompt tuning as a method: learned tokens before the text."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank.core import weight
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.methods.method import Context, Hooks, Method


def prompt(length: int = 20, init: str = "random", text: str = "") -> Method:
    """Prompt tuning: `length` virtual tokens before the text (Lester et al. 2021, arXiv:2104.08691).

    `prompt/embedding` `[length, D]`, in the space of the token embeddings. `init`: `random` (normal, 0.02),
    `vocabulary` (the embeddings of tokens that are drawn uniformly from the vocabulary) or `text` (the embeddings of
    `text`, repeated or cut to `length`).

    Differs from the paper: its random numbers are uniform in (-0.5, 0.5), it draws from the 5,000 most common tokens,
    and its third start, the labels of the classes, is a `text` here.
    """
    if length < 1:
        raise UserError(f"method.length must be at least 1, not {length}")
    if init not in INITS:
        raise unknown("prompt init", init, INITS)
    if bool(text) != (init == "text"):
        raise UserError("method.init='text' starts the prompt from method.text: give both or neither")
    choose = INITS[init]
    calibrate = functools.partial(_from_tokens, choose=functools.partial(choose, text=text)) if choose else None
    return Method(model_options={"num_prompt": length}, trainable=("prompt/.*",), hooks=Hooks(calibrate=calibrate))


def _from_tokens(params: PyTree, context: Context, choose: Callable[..., jax.Array]) -> PyTree:
    old = params["prompt"]["embedding"]
    rows = weight.take(params["embed"]["embedding"], choose(context, len(old)))
    return {**params, "prompt": {"embedding": rows.astype(old.dtype)}}


def _drawn(context: Context, length: int, text: str) -> jax.Array:
    del text
    return jax.random.randint(context.key, (length,), 0, context.tokenizer.vocab_size)


def _of_text(context: Context, length: int, text: str) -> jax.Array:
    ids = context.tokenizer.encode(text)
    if not ids:
        raise UserError(f"method.text {text!r} has no tokens: give a text of at least one token")
    return jnp.array((ids * length)[:length], jnp.int32)


INITS: dict[str, Callable[..., jax.Array] | None] = {"random": None, "vocabulary": _drawn, "text": _of_text}
