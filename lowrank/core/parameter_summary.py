"""A summary of a run's parameters: the weights that each rule matched, and the sizes of model and adapter."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from lowrank.core import tree, weight
from lowrank.core.typing import PyTree


def rule_table(rules: Sequence[tuple[str, Sequence[str]]], params: PyTree, mask: PyTree) -> str:
    """A text table of the weights that each rule matched, and a last line with the trained parameters and bytes.

    The parameters are the entries of the kernels and the learned arrays of forms; scales and caches count as bytes
    only. Ranks that are padded to the largest of their stack count with their padding.

    Args:
      rules: `(pattern, names)` of the matched weights or leaves, from `lowrank.methods.matches`.
      params: the parameters after the rules were applied, as arrays or ShapeDtypeStructs.
      mask: the tree of bools of `lowrank.core.weight.declared_mask`.
    """
    items = dict(_items(params, mask))
    rows: list[tuple[str, ...]] = [("rule", "makes", "leaves", "layers", "parameters", "trained")]
    for pattern, names in rules:
        counts = [items[name] for name in names]
        stacks = {name.split("/")[0]: count["layers"] for name, count in zip(names, counts, strict=True)}
        numbers = [len(names), sum(stacks.values()), *(sum(c[k] for c in counts) for k in ("params", "trained"))]
        rows.append((pattern, ", ".join(sorted({c["makes"] for c in counts})), *(f"{n:,}" for n in numbers)))
    sums = count_parameters(params, mask)
    share = f"{sums['trained_params']:,} of {sums['total_params']:,} parameters ({sums['trained_percent']:.4g} %)"
    size = f"{_size(sums['trained_bytes'])} of {_size(sums['total_bytes'])}"
    return "\n".join(_aligned(rows)) + f"\n\ntrained: {share}, {size}"


def count_parameters(params: PyTree, mask: PyTree) -> dict[str, float]:
    """The `{trained,total}_params`, `{trained,total}_bytes` and `trained_percent`, counted as in `rule_table`."""
    weights = set(tree.leaf_names(params, weight.is_weight))
    items = [item for name, item in _items(params, mask) if name in weights]
    trained, total = sum(i["trained"] for i in items), sum(i["params"] for i in items)
    return {
        "trained_params": trained,
        "total_params": total,
        "trained_percent": 100 * trained / max(total, 1),
        "trained_bytes": sum(i["trained_bytes"] for i in items),
        "total_bytes": sum(i["bytes"] for i in items),
    }


def _items(params: PyTree, mask: PyTree) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(name, counts)` of every weight and of every leaf, which may be a part of a weight."""
    learns = dict(tree.named_leaves(mask))
    added = dict(tree.named_leaves(weight.declared_mask(params)))
    for name, node in tree.named_leaves(params, weight.is_weight):
        inside = [(f"{name}/{part}" if part else name, leaf) for part, leaf in tree.named_leaves(node)]
        for leaf_name, leaf in inside:
            yield leaf_name, _count(leaf_name, "train", leaf.size, [leaf], [leaf] if learns[leaf_name] else [])
        if weight.is_weight(node):
            base = math.prod(node.shape) if node.stored or hasattr(node, "base") else 0  # otherwise it is all learned
            size = base + sum(leaf.size for n, leaf in inside if added[n])
            trained = [leaf for n, leaf in inside if learns[n]]
            yield name, _count(name, _form(node), size, [leaf for _, leaf in inside], trained)


def _count(name: str, makes: str, params: int, leaves: list[Any], trained: list[Any]) -> dict[str, Any]:
    return {
        "makes": makes,
        "layers": leaves[0].shape[0] if name.split("/")[0] in tree.STACKS else 0,
        "params": params,
        "trained": sum(leaf.size for leaf in trained),
        "bytes": sum(map(_bytes, leaves)),
        "trained_bytes": sum(map(_bytes, trained)),
    }


def _form(w: Any) -> str:
    """The title of a form, such as `LoRA`, or `LoRA(NF4)` if it wraps another form."""
    base = getattr(w, "base", None)
    return f"{w.title}({_form(base)})" if weight.is_weight(base) else w.title


def bits_per_element(dtype: Any) -> int:
    """The bits of one element; int4 takes half a byte, although its itemsize is 1."""
    if isinstance(dtype, str):
        dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def _bytes(leaf: Any) -> float:
    return leaf.size * bits_per_element(leaf.dtype) / 8


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table with a rule below its header: words are aligned to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    ]
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
