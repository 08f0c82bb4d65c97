"""JSONL files: what is read, and what is said about a line that cannot be."""

import pytest

from lowrank.core.errors import UserError
from lowrank.data.sources import open_source

TEN = [{"text": f"text {i}", "label": "b" if i % 2 else "a"} for i in range(10)]


def texts(source):
    return [source[i]["text"] for i in range(len(source))]


def test_records_come_in_the_order_of_the_lines_and_blank_ones_are_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"text": "£1"}\n\n  \n{"text": "two"}', encoding="utf-8")
    source = open_source(f"jsonl:{path}", "train", tmp_path)
    assert texts(source) == ["£1", "two"]
    assert source.where(1) == f"{path}:4"


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", range(10)), ("train[:3]", range(3)), ("train[80%:]", (8, 9)), ("train[5:6]+train[:1]", (5, 0))],
)
def test_a_split_is_sliced_as_in_tfds(write, tmp_path, split, expected):
    assert texts(open_source(write(TEN), split, tmp_path)) == [f"text {i}" for i in expected]


def test_the_files_of_a_folder_are_its_splits(write, tmp_path):
    write(TEN[:3], "test.jsonl")
    write(TEN[3:], "train.jsonl")
    assert texts(open_source(f"jsonl:{tmp_path}", "test[1:]", tmp_path)) == ["text 1", "text 2"]
    assert len(open_source(f"jsonl:{tmp_path}", "all", tmp_path)) == 10


def test_a_broken_file_of_another_split_is_not_read(write, tmp_path):
    write(TEN, "train.jsonl")
    (tmp_path / "test.jsonl").write_text("nonsense\n")
    assert len(open_source(f"jsonl:{tmp_path}", "train", tmp_path)) == 10


def test_labels_are_those_of_all_files_and_numbers_sort_as_numbers(write, tmp_path):
    assert open_source(write(TEN), "train[:1]", tmp_path).labels("label") == ("a", "b")
    write(TEN, "train.jsonl")
    write([{"text": "x", "label": "aa"}], "test.jsonl")
    assert open_source(f"jsonl:{tmp_path}", "test", tmp_path).labels("label") == ("a", "aa", "b")
    numbers = [{"text": "x", "label": i} for i in (10, 9, 2)]
    assert open_source(write(numbers, "n.jsonl"), "train", tmp_path).labels("label") == ("2", "9", "10")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"x\.jsonl:2: the line is not JSON: .* at column \d+"),
        (b'{"text": "\xa3"}', r"x\.jsonl:2: the line is not UTF-8"),
        (b'["text"]', r"x\.jsonl:2: a record is a JSON object, not list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        open_source(f"jsonl:{path}", "train", tmp_path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", r"no split 'trian' \(did you mean 'train'\?\); its splits: train"),
        ("train[:200]", "slice .* incompatible with 10 examples"),
        ("train[", "Unrecognized split format"),
        ("train[3:3]", "is empty"),
    ],
)
def test_a_split_that_is_not_there_is_refused(write, tmp_path, split, message):
    with pytest.raises(UserError, match=message):
        open_source(write(TEN), split, tmp_path)


def test_an_empty_file_and_a_missing_one_are_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"empty\.jsonl \(train\) is empty"):
        open_source(write([], "empty.jsonl"), "train", tmp_path)
    with pytest.raises(UserError, match=r"emty\.jsonl does not exist \(did you mean 'empty\.jsonl'\?\)"):
        open_source(f"jsonl:{tmp_path}/emty.jsonl", "train", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"no file \*\.jsonl"):
        open_source(f"jsonl:{tmp_path}/folder", "train", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "cut \ud83d"}', r"\\ud83d is half of a character"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "the line is JSON beyond what is read"),
        ('{"text": ' + "9" * 5000 + "}", "the line is JSON beyond what is read"),
    ],
    ids=["surrogate", "deep", "long"],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a whole one: \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:2: {message}"):
        open_source(f"jsonl:{path}", "train", tmp_path)


def test_a_file_that_takes_the_name_is_not_read_in_its_place(write, tmp_path):
    source = open_source(write(TEN), "train", tmp_path)
    (tmp_path / "new.jsonl").write_text('{"text": "other"}\n')
    (tmp_path / "new.jsonl").rename(tmp_path / "records.jsonl")
    assert texts(source) == [r["text"] for r in TEN]


def test_a_file_that_is_written_to_is_noticed(write, tmp_path):
    source = open_source(write(TEN), "train", tmp_path)
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write("x")
    with pytest.raises(UserError, match=r"records\.jsonl has changed since the run began"):
        source[0]
