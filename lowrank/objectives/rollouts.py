"""A batch of prompts becomes a batch of texts that the model itself writes, with what judges them.

The parameters are those that are trained, in their place: no copy of the model is made. Shapes: B texts, T tokens of a
row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank.core import multihost
from lowrank.core.typing import Batch, Bind, HostArrays, Network, PyTree, Tokenizer
from lowrank.data.row_format import RECORD
from lowrank.generation.generate import key_data
from lowrank.generation.generator import Generator, Request, Sizes, fit
from lowrank.objectives.objective import Rollout
from lowrank.objectives.rewards import Sample

Records = Callable[[int], tuple[Mapping[str, Any], str]]  # a number -> the record and its place


def write_texts(
    rollout: Rollout,
    network: Network,
    params: PyTree,
    batch: Batch,
    *,
    tokenizer: Tokenizer,
    records: Records,
    rng: jax.Array,
    bind: Bind | None = None,
) -> HostArrays:
    """The batch with a text after each prompt, weighted 1, and the arrays of `rollout.judge`.

    `rng` is one key, from which each row draws its own. Rows that only fill up the batch weigh 0. Raises UserError as
    `rollout.judge` does, on every process.
    """
    lengths = batch["segments"].astype(bool).sum(-1)
    prompts = [row[:length].tolist() for row, length in zip(batch["tokens"], lengths, strict=True)]
    texts = _complete(rollout, network, params, prompts, batch["tokens"].shape[-1], tokenizer, rng, bind)
    with multihost.agreed():
        rows = zip(batch[RECORD].tolist(), prompts, texts, strict=True)
        judged = rollout.judge([_sample(tokenizer, *records(record), *both) for record, *both in rows])
    first = multihost.gather_values({name: x.tolist() for name, x in judged.items()})[0]
    filled = {name: np.asarray(x, np.float32) for name, x in first.items()}
    return {**batch, **_rows(batch, prompts, texts, tokenizer.pad_id), **filled}


def sizes(rollout: Rollout, config: Any, rows: int, length: int, stop_ids: Sequence[int]) -> Sizes:
    """The sizes of the state in which `rows` texts are written, each in `length` tokens with its prompt."""
    longest = Request([0] * (length - rollout.max_new), rollout.max_new, tuple(stop_ids))
    return fit(config, [longest] * rows, rows)


def _complete(
    rollout: Rollout,
    network: Network,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    length: int,
    tokenizer: Tokenizer,
    rng: jax.Array,
    bind: Bind | None,
) -> list[list[int]]:
    """The tokens of a text for each prompt, all written at the same time."""
    keys, stops = key_data(rng, len(prompts)), tuple(tokenizer.stop_ids)
    requests = [Request(p, rollout.max_new, stops, rollout.sampling, k) for p, k in zip(prompts, keys, strict=True)]
    shapes = sizes(rollout, network.config, len(prompts), length, stops)
    found = dict(Generator(network, params, shapes, bind).complete(requests))  # type: ignore[arg-type]
    return [found[i] for i in range(len(prompts))]


def _sample(
    tokenizer: Tokenizer, record: Mapping[str, Any], where: str, prompt: Sequence[int], ids: Sequence[int]
) -> Sample:
    text = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    return Sample(record, where, tokenizer.decode(prompt), text, ids, ids[-1] in tokenizer.stop_ids)


def _rows(
    batch: Batch, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of language modeling `[B, T]`, in which the tokens of the texts are learned."""
    B, T = batch["tokens"].shape
    ids, index_T = np.full((B, T + 1), pad_id, np.int32), np.arange(T)
    for row, prompt, text in zip(ids, prompts, texts, strict=True):
        row[: len(prompt) + len(text)] = [*prompt, *text]
    first = np.array([[len(prompt) - 1] for prompt in prompts])
    last = first + np.array([[len(text)] for text in texts])
    inside, learned = index_T < last, (index_T >= first) & (index_T < last)
    return {
        "tokens": np.where(inside, ids[:, :-1], pad_id).astype(np.int32),
        "targets": np.where(inside, ids[:, 1:], pad_id).astype(np.int32),
        "weights": learned.astype(np.float32) * batch["valid"][:, None].astype(np.float32),
        "prompt": index_T <= first,
        "positions": np.where(inside, index_T, 0).astype(np.int32),
        "segments": inside.astype(np.int32),
    }
