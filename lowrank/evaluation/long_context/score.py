"""All long-context scores of a model at once, as `launch.evaluate --long=...` asks for them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, plural
from lowrank.core.typing import Tokenizer
from lowrank.evaluation.long_context.config import DATA, POSITIONS, PRICE, SLIDING, LongConfig, check_scores
from lowrank.evaluation.long_context.reader import Reader
from lowrank.evaluation.long_context.retrieval import TASKS, Cell, retrieve
from lowrank.evaluation.long_context.sliding import by_position, token_scores


@dataclasses.dataclass(frozen=True)
class LongScores:
    """The scores by name, and the tables that they are made of."""

    scores: dict[str, float]
    cells: list[Cell]
    positions: list[dict[str, float]]


def score(
    names: Sequence[str],
    reader: Reader,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    config: LongConfig,
    base: Reader | None = None,
) -> LongScores:
    """The scores of these names, `sliding`, `positions`, `price`, `passkey` and `kv`.

    `documents` are the held-out texts as token ids. `base` is the model before its context was extended and before
    training, with which `price` compares: the perplexity of both in windows as long as its own context.

    Raises UserError for an unknown name, for lengths that the model's context does not cover, for texts that are
    missing, and for a `price` without a base, or of a context that is not longer than the base's.
    """
    context = context_of(reader.network.config)
    settings = check(names, config, context, context_of(base.network.config) if base else context)
    if not documents and (config.filler == DATA or {SLIDING, POSITIONS, PRICE} & {*names}):
        raise UserError("long-context scores of texts need held-out data: set eval.split")
    documents = [np.concatenate(documents)] if config.join and len(documents) else documents
    found, positions = dict[str, float](), list[dict[str, float]]()
    if SLIDING in names:
        found["sliding_perplexity"] = token_scores(reader, documents, settings.window, settings.stride).perplexity
    if POSITIONS in names:
        positions = by_position(token_scores(reader, documents, settings.window, settings.window), settings.bins)
    if PRICE in names and base:
        found |= _price(reader, base, documents)
    filler = np.concatenate(documents) if config.filler == DATA else ()
    how = {"samples": settings.samples, "seed": settings.seed, "filler": filler}
    tasks = [name for name in names if name in TASKS]
    of_task = {t: list(retrieve(reader, tokenizer, t, settings.lengths, settings.depths, **how)) for t in tasks}
    found |= {task: float(np.mean([cell.found for cell in of])) for task, of in of_task.items()}
    return LongScores(found, [cell for of in of_task.values() for cell in of], positions)


def check(names: Sequence[str], config: LongConfig, context: int, base_context: int) -> LongConfig:
    """The settings of a model with this context. Raises UserError as `score` does, but for missing texts."""
    check_scores(names)
    if PRICE in names and base_context >= context:
        has = f"the model has the {plural(context, 'position')} of its base"
        raise UserError(f"price compares with a base of a shorter context, and {has}: leave it out")
    return config.of_context(context)


def context_of(config: Any) -> int:
    """The tokens that a row of a model with this config may have."""
    return config.max_length - config.num_virtual_tokens


def _price(reader: Reader, base: Reader, documents: Sequence[np.ndarray]) -> dict[str, float]:
    """The perplexity at the base's context of the base and of the model, and the difference of their losses."""
    window = context_of(base.network.config)
    before, after = (token_scores(r, documents, window, max(1, window // 4)).perplexity for r in (base, reader))
    found = {"old_context": float(window), "old_context_perplexity_before": before}
    return found | {"old_context_perplexity_after": after, "price_nats": math.log(after) - math.log(before)}
