"""The words of a learned prompt: the tokens of the vocabulary that are nearest to its virtual tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.core.weight import materialize


def nearest(params: PyTree, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`(ids, cosines)` `[T, count]`: the tokens nearest to each virtual token, by falling cosine similarity.

    Raises UserError when the model has no prompt, and when `count` is not in 1..V for a vocabulary of V tokens.
    """
    if "prompt" not in params:
        raise UserError("the model has no learned prompt: its method is neither prompt tuning nor P-tuning")
    table_VxD, prompt_TxD = materialize(params["embed"]["embedding"]), params["prompt"]["embedding"]
    if not 1 <= count <= len(table_VxD):
        raise UserError(f"{count} nearest tokens: there are 1 to {len(table_VxD)}")
    cosines_TxV = _unit(prompt_TxD) @ _unit(table_VxD).T
    cosines, ids = jax.lax.top_k(cosines_TxV, count)
    return np.asarray(ids), np.asarray(cosines)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def table(params: PyTree, tokenizer: Any, count: int) -> str:
    """One line per virtual token: its norm, then its nearest tokens with their cosines."""
    ids, cosines = nearest(params, count)
    norms = np.linalg.norm(np.asarray(params["prompt"]["embedding"], np.float32), axis=-1)
    lines = []
    for i, norm in enumerate(norms):
        words = (f"{_spelt(tokenizer, n)} {c:.2f}" for n, c in zip(ids[i], cosines[i], strict=True))
        lines.append(f"{i:4d}  {norm:8.3f}  " + "  ".join(words))
    return "\n".join([" token      norm  nearest tokens and their cosines", *lines])


def _spelt(tokenizer: Any, index: int) -> str:
    """A token of the vocabulary in quotes; a row beyond the tokenizer's vocabulary by its number."""
    token = tokenizer.backend.id_to_token(int(index))
    return f"<{index}>" if token is None else repr(token)
