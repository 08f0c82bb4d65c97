"""Questions about BBC articles: a name or a number, which no model knows, is cut out of an article's first sentence.

Each comes with the passage that BM25 (Robertson & Zaragoza 2009, by the package rank-bm25) finds for it among the first
paragraphs of all articles.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.files import write_text
from lowrank.data import DataConfig
from lowrank.data.sources import open_source

FOLDER = Path("runs/ladder/questions")
SIZES = {"train": 400, "validation": 64, "test": 48}  # questions of a split
GAP = "____"
WORDS = 45  # the longest passage and the longest sentence
FACT = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+(?: [A-Z][a-z]+)+|£?\$?\d[\d,.]*\d(?:%|bn|m)?)(?=[ ,.])")


def ask(title: str, text: str) -> tuple[str, str] | None:
    """`(question, answer)` of an article, or None if its first sentence is too long or has no fact to cut out.

    The fact is the first name of several words, or the first number of several digits, that the headline lacks.
    """
    sentence = text.split("\n\n")[0]
    facts = [found for found in FACT.finditer(sentence) if found.group() not in title]
    if not facts or len(sentence.split()) > WORDS:
        return None
    start, end = facts[0].span()
    return f"{sentence[:start]}{GAP}{sentence[end:]}", sentence[start:end]


def words(text: str) -> list[str]:
    """The words that BM25 compares."""
    return re.findall(r"\w+", text.lower())


class Passages:
    """The first paragraphs of articles, to be found by BM25."""

    def __init__(self, texts: Sequence[str]):
        """An index of the texts. Raises UserError if the package is missing."""
        try:
            from rank_bm25 import BM25Okapi
        except ImportError:
            raise UserError("retrieval needs the package rank-bm25: pip install 'lowrank[experiments]'") from None
        self.texts = texts
        self._index = BM25Okapi([words(text) for text in texts])

    def find(self, question: str) -> str:
        """The passage with the highest score."""
        scores = self._index.get_scores(words(question.replace(GAP, "")))
        return self.texts[int(scores.argmax())]


def articles(split: str) -> Iterator[Mapping[str, Any]]:
    """The articles of a split."""
    source = open_source("bbc_news", split, DataConfig().data_dir)
    return (source[i] for i in range(len(source)))


def write_questions() -> None:
    """Writes the questions of every split once, as JSONL with `question`, `answer` and `passage`."""
    if FOLDER.exists():
        return
    of_split = {split: list(articles(split)) for split in SIZES}
    texts = [a["text"].split("\n\n")[0] for found in of_split.values() for a in found]
    passages = Passages([" ".join(text.split()[:WORDS]) for text in texts])
    beside = FOLDER.with_name(f"{FOLDER.name}.partial")
    for split, size in SIZES.items():
        asked = [found for a in of_split[split] if (found := ask(a["title"], a["text"]))][:size]
        lines = [{"question": q, "answer": answer, "passage": passages.find(q)} for q, answer in asked]
        write_text(beside / f"{split}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    beside.rename(FOLDER)
