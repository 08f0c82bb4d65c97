"""Trainable tokens as a method: a few rows of the embedding, and of a head that shares it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.methods.method import Context, Export, Hooks, Method
from lowrank.weights import token_embeddings as form

TABLE = "embed/embedding"


def tokens(tokens: Sequence[int | str] | int | str = tuple(range(-16, 0))) -> Method:
    """Trains the embeddings of `tokens` alone: ids, or words that are one token of the vocabulary each.

    Ids below 0 count from the end of the table, where new tokens are. The default is the last 16 rows.
    """
    return token_method(tokens, "method.tokens")


def with_tokens(method: Method, tokens: Sequence[int | str] | int | str) -> Method:
    """`method`, which also trains the embeddings of `tokens`."""
    rows = token_method(tokens, "method.also_tokens")
    calibrations = [hook for hook in (rows.hooks.calibrate, method.hooks.calibrate) if hook]

    def calibrate(params: PyTree, context: Context) -> PyTree:
        for hook in calibrations:
            params = hook(params, context)
        return params

    return dataclasses.replace(
        method,
        rules=(*rows.rules, *method.rules),
        export=dataclasses.replace(method.export, frozen=(*rows.export.frozen, *method.export.frozen)),
        hooks=dataclasses.replace(method.hooks, calibrate=calibrate if calibrations else None),
    )


def token_method(tokens: Sequence[int | str] | int | str, setting: str) -> Method:
    """The method that trains the embeddings of `tokens`. Errors call the option `setting`."""
    wanted = (tokens,) if isinstance(tokens, int | str) else tuple(tokens)
    if not wanted:
        raise UserError(f"{setting} is empty: name the tokens to train, by id or as they are written")
    _check_distinct(wanted, setting)
    words = any(isinstance(token, str) for token in wanted)

    def adapt(key: jax.Array, w: Any, name: str) -> form.TrainableTokens:
        del key, name
        vocabulary = w.shape[-2]
        for token in wanted:
            if isinstance(token, int) and not -vocabulary <= token < vocabulary:
                raise UserError(f"{setting}: {token} is not an id of the vocabulary of {vocabulary}")
        if len(wanted) > vocabulary:
            raise UserError(f"{setting} names {plural(len(wanted), 'token')} of a vocabulary of {vocabulary}")
        ids = range(len(wanted)) if words else _counted(wanted, vocabulary, setting)
        return form.attach(w, jnp.array(ids, jnp.int32))

    def look_up(params: PyTree, context: Context) -> PyTree:
        ids = [token if isinstance(token, int) else _id(token, context.tokenizer, setting) for token in wanted]
        table = params["embed"]["embedding"].base
        table = form.attach(table, jnp.array(_counted(ids, table.shape[-2], setting), jnp.int32))
        return {**params, "embed": {**params["embed"], "embedding": table}}

    hooks = Hooks(calibrate=look_up if words else None)
    return Method(rules=((TABLE, adapt),), export=Export(frozen=(f"{TABLE}/ids",)), hooks=hooks)


def _check_distinct(wanted: Sequence[Any], setting: str) -> None:
    for token in wanted:
        if list(wanted).count(token) > 1:
            raise UserError(f"{setting} names {token!r} twice")


def _counted(ids: Sequence[Any], vocabulary: int, setting: str) -> list[int]:
    ids = [i % vocabulary for i in ids]
    _check_distinct(ids, setting)
    return ids


def _id(word: str, tokenizer: Any, setting: str) -> int:
    found = tokenizer.backend.token_to_id(word)
    ids = [found] if found is not None else tokenizer.encode(word)
    if len(ids) != 1:
        raise UserError(f"{setting}: {word!r} is {plural(len(ids), 'token')}, not one")
    return ids[0]
