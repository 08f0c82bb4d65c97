"""Sequences of many lengths into rows of one length: packed, several to a row, or padded, one to a row.

The segments of a row number its sequences from 1, and 0 is padding; positions restart in each sequence. Shapes: T row
length, B rows, M members of one row.
"""

import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from lowrank.core.typing import HostArrays
from lowrank.data.row_format import PAD_ID, ArraySpec, EncodedSequence

Arrays = Mapping[str, ArraySpec]
LEAST_BINS = 64  # rows that are filled at the same time: the more, the less padding


def pack(sequences: grain.IterDataset, arrays: Arrays, length: int, rows: int, pad_id: int) -> grain.IterDataset:
    """Rows of the `arrays`, `[T]` each, that hold whole sequences.

    The order of the sequences changes only within the bins filled at the same time, a multiple of `rows`.
    """
    encoded = {name: spec for name, spec in arrays.items() if name not in ("segments", "positions")}
    packed = BestFitPackIterDataset(
        sequences,
        length_struct=dict.fromkeys(encoded, length),
        padding_struct={name: _padding(spec, pad_id) for name, spec in encoded.items()},
        num_packing_bins=rows * -(-LEAST_BINS // rows),
        shuffle_bins=False,
    )
    return packed.map(functools.partial(_packed_row, names=tuple(arrays)))


def _packed_row(row: HostArrays, names: Sequence[str]) -> HostArrays:
    row = {**row, "positions": row["tokens_positions"], "segments": row["tokens_segment_ids"]}
    return {name: row[name] for name in names}


def pad(sequence: EncodedSequence, arrays: Arrays, length: int, pad_id: int) -> HostArrays:
    """One sequence as a row of the `arrays`, `[T]` per token; the members of one row as `[M, T]`."""
    if isinstance(sequence, tuple):
        members = [pad(member, arrays, length, pad_id) for member in sequence]
        return {name: np.stack([member[name] for member in members]) for name in members[0]}
    size = len(sequence["tokens"])
    index = np.arange(length)
    derived = {"segments": index < size, "positions": np.where(index < size, index, 0)}
    row = {name: x for name, x in sequence.items() if not arrays[name].per_token}
    for name, spec in arrays.items():
        if name in derived:
            row[name] = derived[name].astype(np.int32)
        elif spec.per_token:
            row[name] = np.pad(sequence[name], (0, length - size), constant_values=_padding(spec, pad_id))
    return row


def padded_batches(
    sequences: Sequence[HostArrays], arrays: Arrays, length: int, size: int, pad_id: int
) -> list[HostArrays]:
    """Batches `[size, length]` of sequences that are at hand, one to a row; see `pad` and `batch`."""
    rows = [pad(sequence, arrays, length, pad_id) for sequence in sequences]
    return [_stack(rows[i : i + size], arrays, size) for i in range(0, len(rows), size)]


def _padding(spec: ArraySpec, pad_id: int) -> float:
    return pad_id if spec.padding == PAD_ID else spec.padding


def batch(rows: grain.IterDataset, arrays: Arrays, size: int) -> grain.IterDataset:
    """Batches `[B, ...]` with `valid` int32 `[B]`: 1, and 0 on the rows that fill up the last batch.

    Those are copies of the last row that add nothing to a loss: their arrays hold the `filler` of their spec. (A row
    of nothing but padding would have attention over nothing, which is NaN in some kernels.)
    """
    return rows.batch(size, batch_fn=functools.partial(_stack, arrays=arrays, size=size))


def _stack(rows: Sequence[HostArrays], arrays: Arrays, size: int) -> HostArrays:
    index = np.minimum(np.arange(size), len(rows) - 1)
    valid = (np.arange(size) < len(rows)).astype(np.int32)
    out = {name: np.stack([row[name] for row in rows])[index] for name in rows[0]}
    for name, spec in arrays.items():
        if spec.filler is not None:
            is_valid = valid.reshape(-1, *(1,) * (out[name].ndim - 1)) == 1
            out[name] = np.where(is_valid, out[name], spec.filler).astype(spec.dtype)
    return out | {"valid": valid}
