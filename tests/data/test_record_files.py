"""Records in files of every kind, in folders and by patterns, and in datasets of the library `datasets`."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from lowrank.core.errors import UserError
from lowrank.data.sources import open_source

ROWS = [{"text": f'text "{i}",\nnext, line {i}', "label": "b" if i % 2 else "a"} for i in range(10)]


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3),
}


def records(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_a_folder_of_shards_and_a_pattern_hold_the_same_records(tmp_path, kind):
    for i, part in enumerate((ROWS[:4], ROWS[4:])):
        WRITERS[kind](tmp_path / f"train-0000{i}-of-00002.{kind}", part)
    WRITERS[kind](tmp_path / f"test.{kind}", [{"text": "other", "label": "c"}])
    folder = open_source(f"{kind}:{tmp_path}", "train", tmp_path)
    assert records(folder) == ROWS
    assert folder.labels("label") == ("a", "b", "c")
    assert folder.fields == ("text", "label")
    pattern = f"{kind}:{tmp_path}/train-*.{kind}"
    assert records(open_source(pattern, "train[30%:50%]+train[:1]", tmp_path)) == [*ROWS[3:5], ROWS[0]]
    single = open_source(f"{kind}:{tmp_path}/train-00001-of-00002.{kind}", "train", tmp_path)
    assert records(single) == ROWS[4:]
    assert single.identity != folder.identity != open_source(pattern, "train[:3]", tmp_path).identity
    with pytest.raises(IndexError):
        folder[10]


def test_a_file_has_one_split_and_the_error_says_how_to_have_two(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(UserError, match=r"no split 'test'; its splits: train; name a folder .* and train\[90%:\]"):
        open_source(f"csv:{tmp_path}/a.csv", "test", tmp_path)


def test_a_record_of_several_lines_is_named_by_its_first(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    source = open_source(f"csv:{tmp_path}/a.csv", "train", tmp_path)
    assert source.where(1) == f"{tmp_path}/a.csv:4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv has no first line with the names of the fields"),
        (b"a,a\n1,2\n", r"a\.csv:1: the field 'a' is there twice"),
        (b"a,b\n1,2\n\n1,2,3\n", r"a\.csv:4: 3 values for 2 fields: quote a value that holds ','"),
        (b'a,b\n1,2\n1,"2\n', r"a\.csv:3: the record cannot be read .*unexpected end of data"),
        (b"a,b\n1,\xa3\n", r"a\.csv:2: the record is not UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(f"csv:{tmp_path}/a.csv", "train", tmp_path)


def test_what_is_no_parquet_and_a_pattern_without_a_file_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet") as caught:
        open_source(f"parquet:{tmp_path}/a.parquet", "train", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no file matches .*\*\.csv"):
        open_source(f"csv:{tmp_path}/*.csv", "train", tmp_path)


def test_objects_in_a_table_lose_the_members_that_only_others_have(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    WRITERS["parquet"](tmp_path / "a.parquet", [{"messages": turns, "note": None}])
    assert records(open_source(f"parquet:{tmp_path}/a.parquet", "train", tmp_path)) == [
        {"messages": turns, "note": None}
    ]


@pytest.fixture
def saved(tmp_path):
    """A folder that `save_to_disk` wrote, with class labels."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(10)]
    made = {n: datasets.Dataset.from_list(rows[s], features) for n, s in (("train", slice(8)), ("test", slice(8, 10)))}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_that_the_library_saved_is_read(saved, tmp_path):
    source = open_source(f"hf:{saved}", "train[50%:]+test", tmp_path)
    assert records(source) == [{"text": f"text {i}", "label": "za"[i % 2]} for i in range(4, 10)]
    assert source.labels("label") == ("z", "a")
    assert source.where(4) == f"hf:{saved} (train[50%:]+test) record 1"
    assert source.identity == open_source(f"hf:{saved}", "train[50%:]+test", tmp_path).identity
    datasets.load_from_disk(saved)["test"].save_to_disk(tmp_path / "one")
    assert [r["text"] for r in records(open_source(f"hf:{tmp_path}/one", "train", tmp_path))] == ["text 8", "text 9"]


def test_a_dataset_of_the_hub_is_asked_for_by_name_config_and_revision(saved, tmp_path, monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return datasets.load_from_disk(saved)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_source("hf:org/name:short@v1", "test", tmp_path)) == 2
    assert len(open_source("hf:org/name", "test", tmp_path)) == 2
    assert asked == [(("org/name", "short"), {"revision": "v1"}), (("org/name", None), {"revision": None})]


def test_what_the_library_cannot_load_is_one_line(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no split 'tst' \(did you mean 'test'\?\); its splits: train, test"):
        open_source(f"hf:{saved}", "tst", tmp_path)
    with pytest.raises(UserError, match=r"cannot load hf:.*a folder of data files is named by their kind"):
        open_source(f"hf:{tmp_path}", "train", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package datasets: install it with pip install 'lowrank\[datasets\]'"
    ):
        open_source(f"hf:{saved}", "train", tmp_path)
