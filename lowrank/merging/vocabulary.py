"""Vocabularies of models that are merged: the base's, one model's or the union, with rows matched by token string.

A token that a model lacks has the base's row if the base has the token, else the mean of the rows of the models that
have it. Rows beyond a tokenizer's tokens are padding: they are kept where the vocabulary is one model's.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core import schema
from lowrank.core.errors import UserError, plural, unknown
from lowrank.merging import structure
from lowrank.merging.checkpoint import Change, Checkpoint
from lowrank.merging.model_spec import ModelSpec
from lowrank.merging.recipe import Recipe

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`ids` of the result's tokens, whose matrices have `rows` rows. `source` is the model whose tokenizer is kept.

    `own` are the ids of each model's tokens; `added` the tokens that a union adds to the tokenizer of `source`.
    """

    ids: Mapping[str, int]
    rows: int
    source: Checkpoint
    own: Mapping[ModelSpec, Mapping[str, int]]
    base: ModelSpec
    added: tuple[str, ...] = ()

    def change_of(self, checkpoint: Checkpoint, checkpoints: Mapping[ModelSpec, Checkpoint]) -> Change:
        """What re-indexes the matrices of a model, one row per token."""
        own = self.own[checkpoint.spec]

        def change(name: str, values: np.ndarray) -> np.ndarray:
            if not structure.VOCABULARY.fullmatch(name):
                return values
            rows = np.zeros((self.rows, *values.shape[1:]), values.dtype)
            for token, i in self.ids.items():
                if token in own:
                    rows[i] = values[own[token]]
            self._fill(name, rows, own, checkpoints)
            start = max(self.ids.values()) + 1
            stop = min(len(values), self.rows) if own.items() <= self.ids.items() else start
            rows[start:stop] = values[start:stop]  # its own padding
            rows[stop:] = rows[:start].mean(0)
            return rows

        return change

    def _fill(
        self, name: str, rows: np.ndarray, own: Mapping[str, int], checkpoints: Mapping[ModelSpec, Checkpoint]
    ) -> None:
        """Fills in the tokens that a model lacks, from the rows of those that have them."""
        for token in self.ids.keys() - own.keys():
            owners = [spec for spec, ids in self.own.items() if token in ids]
            if self.base in owners:
                owners = [self.base]
            found = []
            for spec in owners:
                tensor, i = checkpoints[spec].tensors[name], self.own[spec][token]
                found.append(np.asarray(tensor.read(i, i + 1)[0], rows.dtype))
            rows[self.ids[token]] = np.mean(found, axis=0)

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's files; a union has the tokens that it adds as added tokens."""
        if not self.source.folder.is_dir():
            self.source.source.tokenizer().save(folder)
        for name in (TOKENIZER, "tokenizer_config.json"):
            if (self.source.folder / name).exists():
                shutil.copyfile(self.source.folder / name, folder / name)
        if not self.added:
            return
        content = schema.decode(folder / TOKENIZER)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": False}
        content["added_tokens"] = [
            *(content.get("added_tokens") or []),
            *({"id": self.ids[token], "content": token, **flags} for token in self.added),
        ]
        (folder / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def plan_vocabulary(
    recipe: Recipe, checkpoints: Mapping[ModelSpec, Checkpoint], first: Checkpoint
) -> Vocabulary | None:
    """The vocabulary that a recipe asks for, None if it keeps the models' own, which must then be the same.

    Raises UserError for vocabularies that differ although the recipe keeps them, and for a token beyond a matrix.
    """
    own = {spec: tokens for spec, c in checkpoints.items() if (tokens := _tokens(c)) is not None}
    if not recipe.tokenizer:
        for spec, tokens in own.items():
            if first.spec in own and tokens != own[first.spec]:
                token = min(set(tokens.items()) ^ set(own[first.spec].items()), key=lambda pair: pair[::-1])[0]
                raise UserError(
                    f"the vocabularies of {first.spec} and {spec} differ, at first in {token!r}: set tokenizer_source "
                    "to base, union or a model"
                )
        return None
    for spec in checkpoints:
        if spec not in own:
            raise UserError(f"{spec} has no {TOKENIZER}, which tokenizer_source needs")
    source = _source(recipe, checkpoints, first)
    added: tuple[str, ...] = ()
    ids = dict(own[source.spec])
    if recipe.tokenizer == "union":
        others = dict.fromkeys(token for tokens in own.values() for token in sorted(tokens, key=lambda t: tokens[t]))
        added = tuple(token for token in others if token not in ids)
        start = max(ids.values()) + 1
        ids |= {token: start + i for i, token in enumerate(added)}
    rows = max(ids.values()) + 1
    if recipe.tokenizer != "union":
        rows = max(rows, _rows(source))
    rows = -(-rows // recipe.pad_to_multiple_of) * recipe.pad_to_multiple_of
    return Vocabulary(ids, rows, source, own, first.spec, added)


def _source(recipe: Recipe, checkpoints: Mapping[ModelSpec, Checkpoint], first: Checkpoint) -> Checkpoint:
    if recipe.tokenizer in ("base", "union"):
        return first
    names = {str(spec): checkpoint for spec, checkpoint in checkpoints.items()}
    if recipe.tokenizer not in names:
        raise unknown("tokenizer_source", str(recipe.tokenizer), ["base", "union", *names])
    return names[str(recipe.tokenizer)]


def _rows(checkpoint: Checkpoint) -> int:
    shapes = [t.shape for name, t in checkpoint.tensors.items() if structure.VOCABULARY.fullmatch(name)]
    return int(max((shape[0] for shape in shapes), default=0))


def _tokens(checkpoint: Checkpoint) -> dict[str, int] | None:
    """The ids of a model's tokens, None for a model without a tokenizer."""
    if not checkpoint.folder.is_dir():
        return dict(checkpoint.source.tokenizer().backend.get_vocab())
    if not (checkpoint.folder / TOKENIZER).exists():
        return None
    content: Any = schema.decode(checkpoint.folder / TOKENIZER)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
    tokens = {**vocabulary, **{t["content"]: t["id"] for t in content.get("added_tokens") or ()}}
    rows = _rows(checkpoint)
    for token, i in tokens.items():
        if rows and i >= rows:
            size = plural(rows, "row")
            raise UserError(f"{checkpoint.spec}: token {token!r} has the id {i}, and its matrix has {size}")
    return tokens
