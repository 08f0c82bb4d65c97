"""Trainable token rows: a few rows of the embedding, and of a head that shares it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.errors import UserError
from lowrank.methods.method import Context, Method
from lowrank.weights import rows as form

PyTree = Any
TABLE = "embed/embedding"


def tokens(tokens: Sequence[int | str] | int | str = ()) -> Method:
    """Trains the embeddings of `tokens` alone: ids, or words that are one token of the vocabulary each."""
    wanted = (tokens,) if isinstance(tokens, int | str) else tuple(tokens)
    if not wanted:
        raise UserError("method.tokens is empty: name the tokens to train, by id or as they are written")
    _check_distinct(wanted)
    words = any(isinstance(token, str) for token in wanted)

    def adapt(key: jax.Array, w: Any, name: str) -> form.Rows:
        del key, name
        vocabulary = w.shape[-2]
        for token in wanted:
            if isinstance(token, int) and not 0 <= token < vocabulary:
                raise UserError(f"method.tokens: {token} is not an id of the vocabulary of {vocabulary}")
        if len(wanted) > vocabulary:
            raise UserError(f"method.tokens names {len(wanted)} tokens of a vocabulary of {vocabulary}")
        return form.attach(w, jnp.array(range(len(wanted)) if words else wanted, jnp.int32))

    def look_up(params: PyTree, context: Context) -> PyTree:
        ids = [token if isinstance(token, int) else _id(token, context.tokenizer) for token in wanted]
        _check_distinct(ids)
        table = form.attach(params["embed"]["embedding"].base, jnp.array(ids, jnp.int32))
        return {**params, "embed": {**params["embed"], "embedding": table}}

    return Method(rewrite=((TABLE, adapt),), holds=(f"{TABLE}/ids",), prepare=look_up if words else None)


def _check_distinct(wanted: Sequence[Any]) -> None:
    for token in wanted:
        if list(wanted).count(token) > 1:
            raise UserError(f"method.tokens names {token!r} twice")


def _id(word: str, tokenizer: Any) -> int:
    found = tokenizer.backend.token_to_id(word)
    ids = [found] if found is not None else tokenizer.encode(word)
    if len(ids) != 1:
        raise UserError(f"method.tokens: {word!r} is {len(ids)} tokens, not one")
    return ids[0]
