"""The prose of Python's language reference as documents, a text that the model knows beside the new one.

    python -m experiments.objectives.reference FOLDER

writes train.jsonl and test.jsonl of `text`, one record for each topic; the topics are split by a hash of their names.
`configs/continued.py` replays the one and scores the other.
"""

import pydoc_data.topics
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from experiments.merging.tasks import paragraphs
from experiments.objectives.pairs import write

SPLITS = ("train", "train", "train", "test")  # of a topic, by a hash of its name


def documents(split: str) -> Iterator[dict[str, str]]:
    """The documents of a split: the paragraphs of prose of a topic, in the order of the topics' names.

    Topics share paragraphs: one that is in the training split is left out of the other.
    """
    trained = {paragraph for _, prose in _topics("train") for paragraph in prose} if split != "train" else set()
    for _, prose in _topics(split):
        if kept := [paragraph for paragraph in prose if paragraph not in trained]:
            yield {"text": "\n\n".join(kept)}


def _topics(split: str) -> Iterator[tuple[str, list[str]]]:
    """`(name, paragraphs of prose)` of the topics of a split."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        if SPLITS[zlib.crc32(name.encode()) % len(SPLITS)] == split:
            yield name, list(paragraphs({name: text}))


def main(folder: str) -> None:
    """Writes both files."""
    write(Path(folder), {split: list(documents(split)) for split in ("train", "test")})


if __name__ == "__main__":
    main(sys.argv[1])
