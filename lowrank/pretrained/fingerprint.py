"""A hash that tells the weights of two bases apart without reading either in full."""

import hashlib

import numpy as np

from lowrank.pretrained import hf_files
from lowrank.pretrained.families import family_of
from lowrank.pretrained.resolve import resolve_checkpoint
from lowrank.pretrained.tensor_reader import StoredTensor

SAMPLED = 1 << 14  # entries of a tensor that are hashed, half of them at its start


def fingerprint(spec: str, revision: str | None = None) -> str:
    """The hash of the names, shapes, dtypes, first and last rows of a model's tensors, wherever they lie.

    At most `SAMPLED` entries of a tensor are read, or one row at each end: training moves every row. Raises UserError
    for a model that cannot be resolved.
    """
    source = resolve_checkpoint(spec, revision=revision)
    family, config = family_of(source.hf_config), hf_files.parse_config(source.where, source.hf_config)
    wanted = [name for tensor in family.tensors(config) for name in tensor.names]
    stored, digest = source.tensors(wanted), hashlib.sha256()
    for name in sorted(stored.keys() & set(wanted)):
        tensor = stored[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for start, stop in _ends(tensor) if tensor.readable else ():
            digest.update(np.ascontiguousarray(tensor.read(start, stop)).view(np.uint8).data)
    return digest.hexdigest()


def _ends(tensor: StoredTensor) -> list[tuple[int, int]]:
    """The spans of rows at both ends of a tensor."""
    if not tensor.shape:
        return [(0, 1)]
    rows, width = tensor.shape[0], int(np.prod(tensor.shape[1:], dtype=np.int64))
    most = max(1, SAMPLED // 2 // max(1, width))
    return [(0, rows)] if rows <= 2 * most else [(0, most), (rows - most, rows)]
