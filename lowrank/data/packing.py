"""Sequences of many lengths into rows of one: packed, several to a row, or padded, one to a row.

A row's segments number its sequences from 1, and 0 is padding; positions restart in each. Shapes: T row length, B rows.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from lowrank.core.typing import HostArrays

LEAST_BINS = 64  # rows that are filled side by side: the more, the less padding


def pack(sequences: grain.IterDataset, length: int, rows: int, pad_id: int) -> grain.IterDataset:
    """Rows `tokens, targets, positions, segments` int32 and `weights` float32, `[T]`, each of whole sequences.

    The order of the sequences changes only within the bins filled at once, a multiple of `rows`.
    """
    packed = BestFitPackIterDataset(
        sequences,
        length_struct={"tokens": length, "targets": length, "weights": length},
        padding_struct={"tokens": pad_id, "targets": pad_id, "weights": 0.0},
        num_packing_bins=rows * -(-LEAST_BINS // rows),
        shuffle_bins=False,
    )
    return packed.map(_named)


def _named(row: HostArrays) -> HostArrays:
    kept = {name: row[name] for name in ("tokens", "targets", "weights")}
    return kept | {"positions": row["tokens_positions"], "segments": row["tokens_segment_ids"]}


def pad(sequence: HostArrays, length: int, pad_id: int) -> HostArrays:
    """One sequence as a row of `length` with `segments` and, for language modelling, `positions`; others stay."""
    size = len(sequence["tokens"])
    filled = {"tokens": pad_id, "targets": pad_id, "weights": 0}
    row = {
        name: np.pad(x, (0, length - size), constant_values=filled[name]) if name in filled else x
        for name, x in sequence.items()
    }
    row["segments"] = (np.arange(length) < size).astype(np.int32)
    if "targets" in row:
        row["positions"] = np.where(row["segments"] == 1, np.arange(length), 0).astype(np.int32)
    return row


def batch(rows: grain.IterDataset, size: int) -> grain.IterDataset:
    """Batches `[B,...]` with `valid` int32 `[B]`: 1, and 0 on the rows that fill up the last batch.

    Those are copies of the last row without loss: weights 0 and label -1. (A row of nothing but padding would have
    attention over nothing, which is NaN in some kernels.)
    """
    return rows.batch(size, batch_fn=functools.partial(_stack, size=size))


def _stack(rows: Sequence[HostArrays], size: int) -> HostArrays:
    index = np.minimum(np.arange(size), len(rows) - 1)
    valid = (np.arange(size) < len(rows)).astype(np.int32)
    out = {name: np.stack([row[name] for row in rows])[index] for name in rows[0]}
    if "weights" in out:
        out["weights"] *= valid[:, None].astype(np.float32)
    if "labels" in out:
        out["labels"] = np.where(valid == 1, out["labels"], -1).astype(np.int32)
    return out | {"valid": valid}


def rows_of(batch: HostArrays, process_index: int, process_count: int) -> HostArrays:
    """This process's block of the global batch: rows `[index * B / count, (index + 1) * B / count)`."""
    return {name: np.array_split(x, process_count)[process_index] for name, x in batch.items()}
