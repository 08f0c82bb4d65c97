"""A weight is anything that can be multiplied.

A `Weight` stands where a kernel `[..., in, out]` stood. Models call `dot`, `affine`, `take` and, for experts,
`grouped`, and know no method; plain arrays are weights too. A form is a frozen dataclass registered as a pytree; its
fields say what they are: `trainable()` is learned, `frozen()` is kept, `static()` is not an array; and how they lie
beside the kernel (`axes`), for sharding, and whether weight decay acts on them (`decay`).
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.kernels import half_precision_matmul
from lowrank.kernels.grouped_matmul.dispatch import ragged_dot

PRODUCT = "product"  # what `dot`, `affine` and `grouped` name their results, for remat=dots to save them
ROUTER = "router"  # the name, beside a layer's modules, of what makes gates of the layer's input
Axes = tuple[str | None, ...]  # what each of the last dimensions of a field runs along: "in", "out" or None
KERNEL: Axes = ("in", "out")  # the axes of a field that is laid out as the kernel is
F = TypeVar("F", bound=type)


def trainable(*, axes: Axes = (), decay: bool = True, **kwargs: Any) -> Any:
    """A field that is learned; `axes` name its last dimensions, and weight decay acts on it unless `decay` is off.

    An axis is `"in"` or `"out"`, a dimension that runs along the kernel's inputs or outputs and is sharded as those
    are, or None, such as a rank. A field without axes is replicated. A field that is a form itself, such as a base,
    declares its own fields. Vectors (magnitudes, gains) do not decay: they say so.
    """
    return dataclasses.field(metadata={"trainable": True, "axes": axes, "decay": decay}, **kwargs)


def frozen(*, axes: Axes = (), **kwargs: Any) -> Any:
    """A field that stays as it is: a base weight, codes, a scale. `axes` are as for `trainable`."""
    return dataclasses.field(metadata={"trainable": False, "axes": axes, "decay": False}, **kwargs)


def static(**kwargs: Any) -> Any:
    """A field that is part of the type, not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(trainable, frozen, static))
def form(cls: F) -> F:
    """Class decorator: a frozen dataclass that is a pytree."""
    decorated: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return jax.tree_util.register_dataclass(decorated)


class Weight:
    """What stands where a kernel `[..., in, out]` stood. A form overrides `dot` when it is used for speed."""

    stored: ClassVar[bool] = False  # a kernel in another storage, on which methods are put: it is no adapter
    base: Any  # the weight that a form adapts; forms that only store a kernel lack it
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel it stands for: `[..., in, out]`."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel it stands for."""
        return self.base.dtype

    @property
    def title(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def materialize(self) -> jax.Array:
        """The kernel as one array `[..., in, out]`, for merging and tests."""
        raise NotImplementedError(type(self).__name__)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ materialize()` for `x: [..., in]`; correct and slow unless a form overrides it."""
        return dot(x, self.materialize())

    def affine(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`dot(x) + bias`; (IA)^3 scales the bias as well."""
        return _add_bias(self.dot(x), bias)

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        """The bias that goes with `materialize()`."""
        return bias

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x[i] @ materialize()[g]` of a stack `[G, in, out]`; correct and slow unless a form overrides it."""
        return grouped(x, self.materialize(), sizes)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of an embedding table `[vocab, width]`."""
        return jnp.take(self.materialize(), ids, axis=0)

    def with_gates(self, gates: jax.Array) -> "Weight":
        """The weight with its part of what its layer's router says, `gates` `[rows, tokens or 1, K]`."""
        del gates
        return self


def is_weight(x: Any) -> bool:
    """Whether `x` is a form (plain arrays are weights too, but leaves)."""
    return isinstance(x, Weight)


def is_stored(x: Any) -> bool:
    """Whether `x` is a form that only stores a kernel (codes), with nothing added to it."""
    return is_weight(x) and x.stored


def dot(x: jax.Array, w: Any) -> jax.Array:
    """`x[..., in] @ w[in, out]` in the dtype of `x`, for a form or a plain array."""
    return name_product(w.dot(x) if is_weight(w) else half_precision_matmul.matmul(x, w))


def dot_to_float32(x: jax.Array, w: Any, axis: int = 0) -> jax.Array:
    """`dot(x, w)` in float32; `axis` is the one of `w` that is summed over, 1 for an embedding `[vocab, width]`."""
    if is_weight(w) and axis == 0:
        return dot(x, w).astype(jnp.float32)
    return half_precision_matmul.matmul_to_float32(x, materialize(w), axis)


def affine(x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
    """`dot(x, w) + bias`; `bias` may be None."""
    if bias is None:
        return dot(x, w)
    return name_product(w.affine(x, bias)) if is_weight(w) else _add_bias(dot(x, w), bias)


def grouped(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """`x[i] @ w[g]` for rows `x: [rows, in]` sorted by group, `sizes: [G]` of them in each, and `w: [G, in, out]`."""
    return name_product(w.grouped(x, sizes) if is_weight(w) else ragged_dot(x, w.astype(x.dtype), sizes))


def take(w: Any, ids: jax.Array) -> jax.Array:
    """Rows `ids` of an embedding `[vocab, width]`."""
    return w.take(ids) if is_weight(w) else jnp.take(w, ids, axis=0)


def with_gates(params: PyTree, gates: jax.Array) -> PyTree:
    """`params` with the gates of their layer in every form that asks for them."""
    return jax.tree.map(lambda w: w.with_gates(gates) if is_weight(w) else w, params, is_leaf=is_weight)


def materialize(w: Any) -> jax.Array:
    """The plain array that `w` stands for."""
    return w.materialize() if is_weight(w) else w


def at_least_float32(x: jax.Array) -> jax.Array:
    """At least float32, which updates and norms are computed in; float64 stays, for exact references."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def name_product(y: jax.Array) -> jax.Array:
    """`y` by the name by which remat=dots saves it; of values in a row, it keeps those that gradients ask for."""
    return checkpoint_name(y, PRODUCT)


def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def merge(params: PyTree) -> PyTree:
    """Every form in a parameter tree replaced by the kernel it stands for, and its bias with it."""
    if not isinstance(params, dict):
        return materialize(params)
    merged = {name: merge(child) for name, child in params.items()}
    if is_weight(params.get("kernel")) and "bias" in params:
        merged["bias"] = params["kernel"].merged_bias(params["bias"])
    return merged


Rewrite = Callable[[jax.Array, Any, str], Any]  # (key, weight, name) -> weight


def rewrite(params: PyTree, rules: Sequence[tuple[str, Rewrite]], key: jax.Array) -> PyTree:
    """Replaces each weight whose name a rule's regex matches in full by what the rule makes of it.

    Rules apply in order, so later ones wrap earlier ones. A rule that matches nothing raises UserError. Each
    weight's key depends on its name alone: adding a rule leaves the others' initial values as they were.
    """
    for i, (pattern, fn) in enumerate(rules):
        hits = set(tree.match_names(pattern, tree.leaf_names(params, is_weight), "target"))
        rule_key = jax.random.fold_in(key, i)
        params = tree.map_named(
            lambda n, w, fn=fn, k=rule_key, hits=hits: fn(name_key(k, n), w, n) if n in hits else w,
            params,
            is_leaf=is_weight,
        )
    return params


def name_key(key: jax.Array, name: str) -> jax.Array:
    """A random key that depends on a leaf's name only."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def declared_mask(params: PyTree, train: Sequence[str] = ()) -> PyTree:
    """A tree of bools: the fields that forms declare trainable, and the leaves whose names `train` matches.

    Raises UserError for a leaf that `train` matches and that holds integers, or that its form declares frozen.
    """
    chosen = {n: p for p in train for n in tree.match_names(p, tree.leaf_names(params), "train pattern")}
    learned = functools.partial(map_fields, lambda field, _: field.metadata["trainable"])
    declared = jax.tree.map(lambda w: learned(w) if is_weight(w) else None, params, is_leaf=is_weight)
    declared = dict(tree.named_leaves(declared))
    mask = tree.map_named(lambda n, _: declared.get(n, False) or n in chosen, params)
    for (name, leaf), learns in zip(tree.named_leaves(params), jax.tree.leaves(mask), strict=True):
        if learns and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(f"{name} is {leaf.dtype}: only floating-point leaves can be trained")
    for name in chosen:
        if not declared.get(name, True):
            raise UserError(f"{name} is claimed by {chosen[name]!r}, to be trained, and by its form, to be kept")
    return mask


def map_fields(fn: Callable[[dataclasses.Field[Any], Any], Any], w: Any) -> Any:
    """The form `w` with `fn(field, array)` in place of each array, at every depth of nested forms."""
    values = {}
    for field in dataclasses.fields(w):
        if field.metadata.get("static"):
            continue
        value = getattr(w, field.name)
        nested = dataclasses.is_dataclass(value)
        values[field.name] = map_fields(fn, value) if nested else jax.tree.map(functools.partial(fn, field), value)
    return dataclasses.replace(w, **values)
