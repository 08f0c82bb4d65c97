"""The scores of infilling: gaps in held-out documents are filled in, and compared with what they held.

`exact_match` and `edit_similarity` are those of the greedy texts, the first but for blanks at both ends. `perplexity`
is that of the middle's tokens after the text before and after the gap, and `left_to_right_perplexity` that of the same
tokens after the text before it alone, without sentinels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank import data
from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, Bind, Network, PyTree, Tokenizer
from lowrank.data import packing
from lowrank.data.gaps import Gap, find_gaps, read_texts
from lowrank.data.infill import InfillConfig
from lowrank.data.language import LanguageEncoder
from lowrank.data.render import Plain
from lowrank.data.sentinels import Ids, asked_sequence
from lowrank.data.templates import Template
from lowrank.evaluation.evaluate import evaluate
from lowrank.generation import generate
from lowrank.metrics.text import edit_similarity
from lowrank.models import build_model
from lowrank.objectives import causal_lm


@dataclasses.dataclass(frozen=True)
class InfillingConfig:
    """The group `eval.infill`. The sentinels and the kind of cuts are those of `data.infill`."""

    documents: int = 32  # how many held-out documents have a gap filled in
    middle: str = "span"  # the rule of the gaps, a key of `gaps.MIDDLES`
    longest: int = 64  # the characters of the longest span
    order: str = "psm"  # of prefix, suffix and middle, a key of `infill.ORDERS`
    max_new: int = 40  # the tokens of the longest text

    def __post_init__(self) -> None:
        for name in ("documents", "longest", "max_new"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.infill.{name}={getattr(self, name)} is below 1")


@dataclasses.dataclass(frozen=True)
class Base:
    """The part of a model that generation reads beside the parameters."""

    config: Any
    tokenizer: Tokenizer


class Infilling:
    """Gaps of held-out documents, ready to be filled in by any parameters."""

    def __init__(self, tokenizer: Tokenizer, gaps: Sequence[Gap], *, length: int, batch_size: int, max_new: int):
        """Rows have `length` tokens, and batches `batch_size` rows."""
        self._tokenizer, self._gaps, self._max_new = tokenizer, gaps, max_new
        self._length, self._batch_size = length, batch_size

    def scores(
        self, config: Any, network: Network, params: PyTree, *, bind: Bind | None = None, **options: Any
    ) -> dict[str, float]:
        """The scores by name; `config` is the model's for texts, and `options` are those of `evaluate`."""
        perplexities = {}
        for name, before in (
            ("perplexity", [gap.asked for gap in self._gaps]),
            ("left_to_right_perplexity", [gap.prefix for gap in self._gaps]),
        ):
            found = evaluate(causal_lm(), network, params, self._batches(before), bind=bind, **options)
            perplexities[name] = found["perplexity"]
        base = Base(config, self._tokenizer)
        prompts = [gap.asked for gap in self._gaps]
        texts = generate.texts(base, params, prompts, max_new=self._max_new, bind=bind)
        wanted = [gap.text for gap in self._gaps]
        same = [text.strip() == want.strip() for text, want in zip(texts, wanted, strict=True)]
        return {
            "exact_match": sum(same) / len(same),
            "edit_similarity": edit_similarity(texts, wanted),
            **perplexities,
            "documents": float(len(self._gaps)),
        }

    def _batches(self, before: Sequence[Ids]) -> list[Batch]:
        """The middles after these ids, as batches in which the middles alone weigh."""
        rows = [asked_sequence(ids, gap.middle, False) for ids, gap in zip(before, self._gaps, strict=True)]
        return packing.padded_batches(
            rows, data.LANGUAGE.arrays, self._length, self._batch_size, self._tokenizer.pad_id
        )


def build_infilling(
    group: Mapping[str, Any] | None, train: data.DataConfig, held_out: data.DataConfig, tokenizer: Tokenizer
) -> Infilling | None:
    """The gaps of the group `eval.infill` in documents of `held_out`; None without the group.

    Raises UserError for a wrong option, and as `read_texts` and `find_gaps` do.
    """
    if group is None:
        return None
    config = config_schema.call_with_group(InfillingConfig, group, "eval.infill")
    own = config_schema.call_with_group(InfillConfig, train.infill or {}, "data.infill")
    few = dataclasses.replace(held_out, max_examples=config.documents)
    rule = {"middle": config.middle, "longest": config.longest, "order": config.order}
    rule |= {"sentinels": own.sentinels, "cuts": own.cuts}
    gaps = find_gaps(tokenizer, read_texts(few, tokenizer), length=train.seq_len, **rule)
    return Infilling(tokenizer, gaps, length=train.seq_len, batch_size=train.batch_size, max_new=config.max_new)


def infill_scores(
    model: Any,
    documents: Sequence[str],
    *,
    length: int = 512,
    batch_size: int = 8,
    max_new: int = 40,
    **rule: Any,
) -> dict[str, float]:
    """`exact_match`, `edit_similarity`, `perplexity`, `left_to_right_perplexity` and `documents`, by name.

    `model` has `config`, `tokenizer`, `params` and `bind`, as a `pretrained.Pretrained` that was read or adapted has.
    `rule` are the keywords of `find_gaps`: `middle`, `longest`, `order`, `sentinels` and `cuts`. Gaps are in the first
    `length` tokens of a document. Raises UserError as `find_gaps` does.
    """
    gaps = find_gaps(model.tokenizer, documents, length=length, **rule)
    infilling = Infilling(model.tokenizer, gaps, length=length, batch_size=batch_size, max_new=max_new)
    return infilling.scores(model.config, build_model(model.config), model.params, bind=model.bind)


def document_scores(
    model: Any, documents: Sequence[str], *, length: int = 512, batch_size: int = 8
) -> dict[str, float]:
    """`perplexity`, `nll` (nats per token) and `tokens` of documents that a model reads from left to right.

    `model` is that of `infill_scores`. Each document has its end token, and is cut into rows of `length` tokens that
    overlap by one token.
    """
    encode = LanguageEncoder(Plain(Template("", "{text}")), model.tokenizer, length, prompt_weight=1.0)
    found = [encode({"text": text}, f"document {number}")[0] for number, text in enumerate(documents)]
    rows = [row for sequences in found for row in sequences]
    batches = packing.padded_batches(rows, data.LANGUAGE.arrays, length, batch_size, model.tokenizer.pad_id)
    return evaluate(causal_lm(), build_model(model.config), model.params, batches, bind=model.bind)
