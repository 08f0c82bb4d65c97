"""Pairs of answers by a rule: for an article's headline, its own is chosen and its first sentence is rejected.

    python -m experiments.objectives.pairs FOLDER

writes train.jsonl and test.jsonl of `prompt`, `chosen` and `rejected` from the articles of BBC news, which
`configs/dpo.py` reads. The rule stands for readers who want few words: both answers are about the article.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from configs.quickstart import PROMPT
from lowrank.core.files import write_text
from lowrank.core.paths import expand
from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source

WORDS = 50  # of the article, which the prompt shows


def pairs(split: str) -> Iterator[dict[str, str]]:
    """The pairs of a split of BBC news, in the order of its articles."""
    source = open_source("bbc_news", split, expand(DATA_DIR))
    for record in map(source.__getitem__, range(len(source))):
        sentence = re.split(r"(?<=[.!?])\s", record["text"].strip(), maxsplit=1)[0]
        text = " ".join(record["text"].split()[:WORDS])
        if len(sentence.split()) > len(record["title"].split()):
            yield {
                "prompt": PROMPT.format(text=text),
                "chosen": f" {record['title']}",
                "rejected": f" {sentence}",
            }


def main(folder: str) -> None:
    """Writes both files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        write_text(Path(folder) / f"{split}.jsonl", "".join(f"{json.dumps(pair)}\n" for pair in pairs(split)))


if __name__ == "__main__":
    main(sys.argv[1])
