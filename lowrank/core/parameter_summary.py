"""What every rule of a run matched, and how much of the model is trained."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from lowrank.core import tree, weight
from lowrank.core.typing import PyTree


def rule_table(rules: Sequence[tuple[str, Sequence[str]]], params: PyTree, mask: PyTree) -> str:
    """A text table of what each rule matched, then what is trained in all, in parameters and bytes.

    `parameters` are the kernels as shaped and what forms add to learn; scales and caches count only as bytes.
    Ranks that are padded to the largest of their stack count as stored.

    Args:
      rules: `(pattern, names)` of matched weights or leaves, as `lowrank.methods.matches` gives them.
      params: the parameters after the rules were applied; arrays or ShapeDtypeStructs.
      mask: as `lowrank.core.weight.declared_mask` gives it.
    """
    items = dict(_items(params, mask))
    rows: list[tuple[str, ...]] = [("rule", "makes", "leaves", "layers", "parameters", "trained")]
    for pattern, names in rules:
        hits = [items[name] for name in names]
        stacks = {name.split("/")[0]: item["layers"] for name, item in zip(names, hits, strict=True)}
        numbers = [len(names), sum(stacks.values()), *(sum(h[k] for h in hits) for k in ("params", "trained"))]
        rows.append((pattern, ", ".join(sorted({h["makes"] for h in hits})), *(f"{n:,}" for n in numbers)))
    sums = count_parameters(params, mask)
    share = f"{sums['trained_params']:,} of {sums['total_params']:,} parameters ({sums['trained_percent']:.4g} %)"
    size = f"{_size(sums['trained_bytes'])} of {_size(sums['total_bytes'])}"
    return "\n".join(_aligned(rows)) + f"\n\ntrained: {share}, {size}"


def count_parameters(params: PyTree, mask: PyTree) -> dict[str, float]:
    """Counted as `rule_table` does: `{trained,total}_params`, `{trained,total}_bytes`, `trained_percent`."""
    whole = set(tree.leaf_names(params, weight.is_weight))
    items = [item for name, item in _items(params, mask) if name in whole]
    trained, total = sum(i["trained"] for i in items), sum(i["params"] for i in items)
    return {
        "trained_params": trained,
        "total_params": total,
        "trained_percent": 100 * trained / max(total, 1),
        "trained_bytes": sum(i["trained_bytes"] for i in items),
        "total_bytes": sum(i["bytes"] for i in items),
    }


def _items(params: PyTree, mask: PyTree) -> Iterator[tuple[str, dict[str, Any]]]:
    """The counts of every weight, and of every leaf (which may be part of one)."""
    learns = dict(tree.named_leaves(mask))
    added = dict(tree.named_leaves(weight.declared_mask(params)))
    for name, node in tree.named_leaves(params, weight.is_weight):
        inside = [(f"{name}/{part}" if part else name, leaf) for part, leaf in tree.named_leaves(node)]
        for leaf_name, leaf in inside:
            yield leaf_name, _count(leaf_name, "train", leaf.size, [leaf], [leaf] if learns[leaf_name] else [])
        if weight.is_weight(node):
            kept = math.prod(node.shape) if node.stored or hasattr(node, "base") else 0  # else it is learned itself
            size = kept + sum(leaf.size for n, leaf in inside if added[n])
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
    """`LoRA`, or `LoRA(NF4)` where one form wraps another."""
    base = getattr(w, "base", None)
    return f"{w.title}({_form(base)})" if weight.is_weight(base) else w.title


def bits_per_element(dtype: Any) -> int:
    """Of one number: int4 takes half a byte, which its itemsize does not say."""
    if isinstance(dtype, str):
        dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def _bytes(leaf: Any) -> float:
    return leaf.size * bits_per_element(leaf.dtype) / 8


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows in columns of equal width: words to the left, numbers to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))] for row in rows
    ]
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
