"""Several sources as one: one after another, or mixed so that each has a share of the tokens.

A mixture is written `0.7 * jsonl:chats.jsonl + 0.3 * bbc_news`, and sources without a weight follow one another.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain

from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike
from lowrank.data.concatenation import Concatenation
from lowrank.data.sources import Source, open_source
from lowrank.data.templates import Record

_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+)\s*\*\s*(\S.*)")


class Part(NamedTuple):
    """One source, and its weight in the mixture; None where sources follow one another."""

    source: Source
    weight: float | None


def open_parts(spec: str, split: str, data_dir: PathLike) -> list[Part]:
    """The sources of `SPEC`, of `SPEC + SPEC` or of `WEIGHT * SPEC + WEIGHT * SPEC`, with the same split of each.

    Raises UserError as `open_source` does, for a weight of 0, and for weights that some of the sources have.
    """
    terms = [term.strip() for term in re.split(r"\s\+\s", spec)]
    found = [_WEIGHTED.fullmatch(term) for term in terms]
    names = [match[2] if match else term for match, term in zip(found, terms, strict=True)]
    if any(found) and not all(found):
        bare = next(term for term, match in zip(terms, found, strict=True) if not match)
        raise UserError(f"data.source: {bare!r} has no weight, and others have: write WEIGHT * {bare}")
    weights = [float(match[1]) if match else None for match in found]
    if 0 in weights:
        raise UserError(
            f"data.source: {names[weights.index(0)]!r} has the weight 0: give a positive weight, or leave it out"
        )
    return [Part(open_source(name, split, data_dir), weight) for name, weight in zip(names, weights, strict=True)]


class Several:
    """The records of several sources, one source after another. `labels` are those of all of them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.name = " + ".join(source.name for source in sources)
        self.identity = " + ".join(source.identity for source in sources)
        self.fields = tuple(dict.fromkeys(field for source in sources for field in source.fields))
        self.typed = all(source.typed and source.fields == self.fields for source in sources)
        self._places = Concatenation(map(len, sources))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        source, i = self._at(index)
        return source[i]

    def where(self, index: int) -> str:
        """The place of the record in its source."""
        source, i = self._at(index)
        return source.where(i)

    def labels(self, field: str) -> tuple[str, ...]:
        """The labels of all sources, in the order in which these name them."""
        return tuple(dict.fromkeys(label for source in self.sources for label in source.labels(field)))

    def _at(self, index: int) -> tuple[Source, int]:
        part, i = self._places.find(index)
        return self.sources[part], i


class _Member:
    """One source of several, whose labels are those of all of them."""

    def __init__(self, source: Source, everything: Several) -> None:
        self._source, self.labels = source, everything.labels
        self.typed, self.name, self.fields = source.typed, source.name, source.fields
        self.identity, self.where = source.identity, source.where

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._source[index]


def join(sources: Sequence[Source]) -> Source:
    """The sources one after another; a single one is itself."""
    return Several(sources) if len(sources) > 1 else sources[0]


def members(source: Source) -> list[Source]:
    """The sources that `join` was given, each of which knows the labels of all."""
    return [_Member(part, source) for part in source.sources] if isinstance(source, Several) else [source]


def mix_by_tokens(
    streams: Sequence[grain.IterDataset], weights: Sequence[float], count: Callable[[Any], int]
) -> grain.IterDataset:
    """The elements of the streams, so that of the tokens that `count` finds each stream has its weight's share.

    The next element is of the stream with the fewest tokens for its weight, so that the shares are exact but for one
    element. The others go on where a stream ends.
    """
    return _Mixed(streams, weights, count)


class _Mixed(grain.IterDataset):
    def __init__(
        self, streams: Sequence[grain.IterDataset], weights: Sequence[float], count: Callable[[Any], int]
    ) -> None:
        super().__init__(streams)
        self._weights, self._count = weights, count

    def __iter__(self) -> grain.DatasetIterator:
        return _MixedIterator([iter(parent) for parent in self._parents], self._weights, self._count)


class _MixedIterator(grain.DatasetIterator):
    """Its state are the streams' states, the tokens of each so far, and whether it has ended."""

    def __init__(self, streams: Sequence[Any], weights: Sequence[float], count: Callable[[Any], int]) -> None:
        super().__init__(streams)
        self._weights, self._count = weights, count
        self._tokens, self._ended = [0] * len(streams), [False] * len(streams)

    def __next__(self) -> Any:
        while live := [k for k, ended in enumerate(self._ended) if not ended]:
            k = min(live, key=lambda k: self._tokens[k] / self._weights[k])
            try:
                element = next(self._parents[k])
            except StopIteration:
                self._ended[k] = True
                continue
            self._tokens[k] += self._count(element)
            return element
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        streams = [parent.get_state() for parent in self._parents]
        return {"streams": streams, "tokens": list(self._tokens), "ended": list(self._ended)}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, saved in zip(self._parents, state["streams"], strict=True):
            parent.set_state(saved)
        self._tokens, self._ended = list(state["tokens"]), list(state["ended"])
