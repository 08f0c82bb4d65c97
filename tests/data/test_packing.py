"""Packing and padding: every sequence once and whole, and rows that fill up count for nothing."""

import grain
import numpy as np
import pytest

from lowrank.data import LABELED, LANGUAGE, packing

T, PAD = 16, 99


def sequence(start, size):
    tokens = np.arange(start, start + size, dtype=np.int32)
    weights, prompt = np.full(size, 0.5, np.float32), np.arange(size) < 2
    return {"tokens": tokens, "targets": tokens + 1, "weights": weights, "prompt": prompt}


@pytest.fixture
def sequences():
    sizes = np.random.default_rng(0).integers(1, T + 1, 200)
    return [sequence(100 * (i + 1), int(size)) for i, size in enumerate(sizes)]


def packed(sequences, rows=4):
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return list(packing.pack(grain.MapDataset.source(sequences).to_iter_dataset(read), LANGUAGE.arrays, T, rows, PAD))


def segments_of(rows):
    """`{first token: (tokens, targets, weights, positions)}` of every segment in the rows."""
    found = {}
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            at = row["segments"] == segment
            assert np.ptp(np.flatnonzero(at)) + 1 == at.sum()  # in one stretch
            parts = [row[name][at] for name in ("tokens", "targets", "weights", "positions")]
            assert found.setdefault(int(parts[0][0]), parts) is parts  # once
    return found


def test_each_sequence_is_packed_once_and_whole_with_positions_of_its_own(sequences):
    found = segments_of(packed(sequences))
    assert len(found) == len(sequences)
    for s in sequences:
        tokens, targets, weights, positions = found[int(s["tokens"][0])]
        np.testing.assert_array_equal(tokens, s["tokens"])
        np.testing.assert_array_equal(targets, s["targets"])
        np.testing.assert_array_equal(weights, s["weights"])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))


def test_padding_has_segment_zero_the_pad_token_and_no_weight(sequences):
    rows = packed(sequences)
    gaps = [row["segments"] == 0 for row in rows]
    assert sum(gap.sum() for gap in gaps) > 0
    for row, gap in zip(rows, gaps, strict=True):
        assert (row["tokens"][gap] == PAD).all()
        assert (row["targets"][gap] == PAD).all()
        assert (row["weights"][gap] == 0).all()
        assert (row["positions"][gap] == 0).all()


def test_packing_fills_rows_well(sequences):
    rows = packed(sequences)
    assert np.mean([row["segments"] > 0 for row in rows]) > 0.9
    assert {row["tokens"].shape for row in rows} == {(T,)}
    assert {row[name].dtype for row in rows for name in ("tokens", "targets", "segments")} == {np.dtype(np.int32)}
    assert all((row["prompt"] == ((row["positions"] < 2) & (row["segments"] > 0))).all() for row in rows)


def test_a_padded_row_holds_one_sequence():
    row = packing.pad(sequence(5, 6), LANGUAGE.arrays, T, PAD)
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 10] + [PAD] * 10
    assert row["segments"].tolist() == [1] * 6 + [0] * 10
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 10
    assert row["weights"].tolist() == [0.5] * 6 + [0] * 10
    assert {name: x.dtype for name, x in row.items()} == {
        name: x.dtype for name, x in packed([sequence(5, 6)])[0].items()
    }


def test_the_members_of_a_row_stay_together_and_are_padded_apart():
    row = packing.pad((sequence(5, 6), sequence(20, 4)), LANGUAGE.arrays, T, PAD)
    for i, member in enumerate((sequence(5, 6), sequence(20, 4))):
        alone = packing.pad(member, LANGUAGE.arrays, T, PAD)
        for name in alone:
            np.testing.assert_array_equal(row[name][i], alone[name])
            assert row[name].dtype == alone[name].dtype


def batches(count, size, **row):
    arrays = {name: spec for name, spec in (LANGUAGE.arrays | LABELED.arrays).items() if name in row}
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = grain.MapDataset.range(count).map(lambda i: {"tokens": np.full(3, i, np.int32), **row})
    return list(packing.batch(rows.to_iter_dataset(read), arrays, size))


def test_the_last_batch_is_filled_up_with_rows_without_weight():
    _, last = batches(6, 4, weights=np.full(3, 0.5, np.float32))
    assert last["valid"].tolist() == [1, 1, 0, 0]
    assert last["tokens"][:, 0].tolist() == [4, 5, 5, 5]
    assert last["weights"].sum(axis=1).tolist() == [1.5, 1.5, 0, 0]
    assert last["weights"].dtype == np.float32


def test_rows_of_several_sequences_are_filled_up_alike():
    _, last = batches(6, 4, weights=np.full((2, 3), 0.5, np.float32))
    assert last["weights"].sum(axis=(1, 2)).tolist() == [3, 3, 0, 0]


def test_the_last_batch_is_filled_up_with_rows_of_no_label():
    first, last = batches(6, 4, labels=np.int32(2))
    assert first["labels"].tolist() == [2, 2, 2, 2]
    assert last["labels"].tolist() == [2, 2, -1, -1]
    assert last["labels"].dtype == np.int32
