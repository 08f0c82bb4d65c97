"""The BBC News dataset: what is an article, which repeat, and that no split has seen another's."""

import os

import pytest

from lowrank.core.errors import UserError
from lowrank.data import bbc_news
from lowrank.data.sources import open_source
from lowrank.data.tfds_source import prepared


def article(key, text, title="A headline"):
    return bbc_news.Article(key, title, text, key.split("/")[0])


def words(start, stop):
    return " ".join(f"word{i}" for i in range(start, stop))


def test_the_first_line_is_the_title_and_the_rest_the_text(news_folder):
    first = bbc_news.read(news_folder)[0]
    assert (first.key, first.title, first.label) == ("business/000", "Headline business 0", "business")
    assert first.text.startswith("business0word0 ")
    assert "\n\nSecond business0word0" in first.text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_pound_sign_is_read_in_either_encoding(tmp_path, encoding):
    (tmp_path / "tech").mkdir()
    (tmp_path / "tech" / "001.txt").write_bytes("£5m deal\n\nIt cost £5m.\n".encode(encoding))
    (read,) = bbc_news.read(tmp_path)
    assert (read.title, read.text) == ("£5m deal", "It cost £5m.")


def test_an_article_without_text_is_named(tmp_path):
    (tmp_path / "tech").mkdir()
    (tmp_path / "tech" / "001.txt").write_text("Only a headline\n")
    with pytest.raises(UserError, match=r"tech/001\.txt lacks a headline or a text"):
        bbc_news.read(tmp_path)


def test_a_folder_without_articles_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no articles"):
        bbc_news.read(tmp_path)


def test_articles_of_one_text_are_kept_once_whatever_their_headline():
    kept = bbc_news.distinct([article("tech/1", "Same text."), article("tech/2", "same  text", "Another")])
    assert [a.key for a in kept] == ["tech/1"]


def test_articles_that_share_passages_form_a_group():
    story, update, other = words(0, 100), words(40, 140), words(500, 600)
    assert bbc_news.groups([article("tech/1", story), article("tech/2", other), article("tech/3", update)]) == [
        [0, 2],
        [1],
    ]


def test_a_group_stays_in_one_split():
    chain = [article(f"tech/{i}", words(40 * i, 40 * i + 100)) for i in range(20)]
    splits = bbc_news.split(chain)
    assert sorted(map(len, splits.values())) == [0, 0, 20]


def test_an_article_stays_in_its_split_when_others_come():
    some = [article(f"tech/{i}", words(200 * i, 200 * i + 50)) for i in range(30)]
    few, many = bbc_news.split(some[:20]), bbc_news.split(some)
    assert all({a.key for a in few[name]} <= {a.key for a in many[name]} for name in few)
    assert all(many.values())


def test_the_builder_prepares_a_folder_of_articles_once(news_folder, tmp_path):
    builder = prepared("bbc_news", tmp_path / "tfds", texts=str(news_folder))
    stamp = os.stat(builder.data_path).st_mtime_ns
    again = prepared("bbc_news", tmp_path / "tfds", texts=str(news_folder / "gone"))
    assert os.stat(again.data_path).st_mtime_ns == stamp
    assert again.info.splits.total_num_examples == 60
    assert sorted(p.name for p in (tmp_path / "tfds").iterdir()) == ["bbc_news", "downloads"]


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no articles"):
        prepared("bbc_news", tmp_path / "tfds", texts=str(tmp_path))
    assert not list((tmp_path / "tfds").glob("*bbc*"))
    assert not list((tmp_path / "tfds").glob(".*"))


def test_what_a_kill_left_of_a_preparation_is_removed(news_folder, tmp_path):
    left = tmp_path / "tfds" / ".preparing-bbc_news.0123456789ab"
    left.mkdir(parents=True)
    prepared("bbc_news", tmp_path / "tfds", texts=str(news_folder))
    assert not left.exists()


def test_of_two_processes_that_prepare_at_once_the_first_wins(news_folder, tmp_path, monkeypatch):
    rename = os.rename

    def overtaken(source, target):
        monkeypatch.setattr(os, "rename", rename)
        prepared("bbc_news", tmp_path / "tfds", texts=str(news_folder))
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    builder = prepared("bbc_news", tmp_path / "tfds", texts=str(news_folder))
    assert os.rename is rename
    assert builder.info.splits.total_num_examples == 60
    assert not list((tmp_path / "tfds").glob(".*"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return {name: open_source("bbc_news", name, folder) for name in ("train", "validation", "test")}


def test_the_real_collection_has_the_documented_splits(real):
    assert {name: len(source) for name, source in real.items()} == {"train": 1670, "validation": 224, "test": 193}
    assert real["test"].labels("label") == ("business", "entertainment", "politics", "sports", "tech")


def test_no_real_headline_or_passage_is_in_two_splits(real):
    records = {name: [source[i] for i in range(len(source))] for name, source in real.items()}
    seen = {r["title"] for r in records["train"]} | {r["title"] for r in records["validation"]}
    assert not seen & {r["title"] for r in records["test"]}

    paragraphs = {p for r in records["train"] for p in r["text"].split("\n\n") if len(p) > 200}
    repeats = [p for r in records["test"] for p in r["text"].split("\n\n") if p in paragraphs]
    assert len(repeats) <= 3, repeats
    assert len(paragraphs) > 5000
