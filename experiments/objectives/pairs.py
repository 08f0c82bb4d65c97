"""Pairs of answers by a rule, made of BBC news: an article's own headline is chosen over a worse line for the article.

    python -m experiments.objectives.pairs FOLDER

writes train.jsonl and test.jsonl of `prompt`, `chosen` and `rejected`, which `configs/dpo.py` reads. The rejected line
breaks one demand of the rule, in turn: the headline of another article (it is of something else), the article's first
sentence (it is long), or its headline in capitals with quotation marks (it has another format).
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.quickstart import PROMPT
from lowrank.core.files import write_text
from lowrank.core.paths import expand
from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source

WORDS = 30  # of the article, which the prompt shows
LONGEST = 8  # words of a headline that the rule calls brief
KINDS = ("quality", "brevity", "format")  # the demand that the rejected line of a pair breaks
Pair = dict[str, str]


def pairs(split: str) -> Iterator[Pair]:
    """The pairs of a split of BBC news, in the order of its articles, with the `kind` of each."""
    source = open_source("bbc_news", split, expand(DATA_DIR))
    records = list(map(source.__getitem__, range(len(source))))
    for i, record in enumerate(records):
        kind = KINDS[i % len(KINDS)]
        rejected = _rejected(kind, record, records[i - 1])
        if is_brief(record["title"]) and rejected != record["title"]:
            prompt = PROMPT.format(text=shown(record))
            yield {"prompt": prompt, "chosen": f" {record['title']}", "rejected": f" {rejected}", "kind": kind}


def _rejected(kind: str, record: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if kind == "quality":
        return other["title"]
    if kind == "format":
        return f'"{record["title"].upper()}"'
    return re.split(r"(?<=[.!?])\s", record["text"].strip(), maxsplit=1)[0]


def shown(record: Mapping[str, Any]) -> str:
    """The beginning of an article, as prompts show it."""
    return " ".join(record["text"].split()[:WORDS])


def is_brief(line: str) -> bool:
    """Whether a line has at most `LONGEST` words."""
    return len(line.split()) <= LONGEST


def follows_rule(line: str, article: str) -> bool:
    """Whether a generated line meets all demands: brief, in a headline's format, and of words of the article.

    A headline is one line that is neither quoted, nor ended like a sentence, nor in capitals. It is of the article if
    half of its words of four letters and more begin as a word that the article shows.
    """
    line = line.strip()
    if not line or not is_brief(line) or "\n" in line or line[0] in "\"'“" or line[-1] in ".!:" or line.isupper():
        return False
    stems = {word[:4] for word in _words(article)}
    found = [word[:4] in stems for word in _words(line) if len(word) >= 4]
    return bool(found) and sum(found) >= len(found) / 2


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def write(folder: Path, texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the records of each split as `SPLIT.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in texts.items():
        write_text(folder / f"{split}.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))


if __name__ == "__main__":
    write(Path(sys.argv[1]), {split: list(pairs(split)) for split in ("train", "test")})
