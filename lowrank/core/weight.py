"""A weight is anything that can be multiplied: the base class of all forms, and the products that models call.

A `Weight` takes the place of a kernel `[..., in, out]`. Models call `dot`, `affine`, `take` and, for experts,
`grouped`, and know no method; plain arrays are weights too. A form is a frozen dataclass that is registered as a
pytree. Its fields are declared by `trainable()` (learned), `frozen()` (not learned) or `static()` (not an array). They
also declare their axes beside the kernel's (`axes`), for sharding, and whether weight decay acts on them (`decay`).
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

PRODUCT = "product"  # the checkpoint name of the results of `dot`, `affine` and `grouped`, which remat=dots saves
ROUTER = "router"  # the name, beside a layer's modules, of the form that computes gates from the layer's input
Axes = tuple[str | None, ...]  # the kernel's axis, "in" or "out", of each of a field's last dimensions, or None
KERNEL: Axes = ("in", "out")  # the axes of a field with the kernel's layout
F = TypeVar("F", bound=type)


def trainable(*, axes: Axes = (), decay: bool = True, change: bool = False, **kwargs: Any) -> Any:
    """A learned field; `axes` name its last dimensions, and weight decay acts on it unless `decay` is False.

    With `change`, the field is added to entries of the base that would be trained themselves in another form. Decay
    then draws these entries to the base's, and a run's log says so.

    An axis is `"in"` or `"out"` for a dimension that runs along the kernel's inputs or outputs and is sharded as they
    are, and None for another dimension, such as a rank. A field without axes is replicated. A field that is a form
    itself, such as a base, declares its own fields. Vectors, such as magnitudes and gains, are declared without decay.
    """
    metadata = {"trainable": True, "axes": axes, "decay": decay, "change": change}
    return dataclasses.field(metadata=metadata, **kwargs)


def frozen(*, axes: Axes = (), **kwargs: Any) -> Any:
    """A field that is not trained, such as a base weight, codes or a scale; `axes` name its last dimensions."""
    return dataclasses.field(metadata={"trainable": False, "axes": axes, "decay": False, "change": False}, **kwargs)


def static(**kwargs: Any) -> Any:
    """A field that is not an array: it belongs to the structure of the pytree."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(trainable, frozen, static))
def form(cls: F) -> F:
    """Class decorator: a frozen dataclass that is a pytree."""
    decorated: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return jax.tree_util.register_dataclass(decorated)


class Weight:
    """The base class of forms, each of which takes the place of a kernel `[..., in, out]`.

    Its products materialize the kernel, which is correct and slow. A form overrides `dot_to_float32` for speed, and so
    every sum and every gain of a form is rounded once, at the end.
    """

    stored: ClassVar[bool] = False  # True for a quantized or otherwise stored kernel, False for an adapter
    base: Any  # the weight that a form adapts; forms that only store a kernel lack it
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[..., in, out]` of the kernel."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel."""
        return self.base.dtype

    @property
    def title(self) -> str:
        """The form's name in tables."""
        return type(self).__name__

    def materialize(self) -> jax.Array:
        """The kernel as one array `[..., in, out]`, for merging and tests."""
        raise NotImplementedError(type(self).__name__)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ materialize()` for `x: [..., in]`, in the dtype of `x`: `dot_to_float32`, rounded once."""
        return self.dot_to_float32(x).astype(x.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ materialize()` for `x: [..., in]`, in float32 for half-precision `x`, otherwise in the dtype of `x`."""
        return dot_to_float32(x, self.materialize())

    def affine(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`dot(x) + bias`, rounded once."""
        return self.affine_to_float32(x, bias).astype(x.dtype)

    def affine_to_float32(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`affine(x)` in float32 for half-precision `x`, otherwise in the dtype of `x`; (IA)^3 scales the bias too."""
        return _add_bias(self.dot_to_float32(x), bias)

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        """The bias of the layer whose kernel is `materialize()`."""
        return bias

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x[i] @ materialize()[g]` for a stack `[G, in, out]` and rows sorted by group, `sizes: [G]` of each."""
        return self.grouped_to_float32(x, sizes).astype(x.dtype)

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`grouped(x, sizes)` in float32 for half-precision `x`, otherwise in the dtype of `x`."""
        return grouped_to_float32(x, self.materialize(), sizes)

    def take(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` of an embedding table `[vocab, width]`."""
        return jnp.take(self.materialize(), ids, axis=0)

    def dot_transposed_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ materialize().T` for `x: [..., width]` and an embedding `[vocab, width]`, as `dot_to_float32`."""
        return half_precision_matmul.matmul_to_float32(x, self.materialize(), 1)

    def with_gates(self, gates: jax.Array) -> "Weight":
        """The weight with its part of the gates `[rows, tokens or 1, K]` of its layer's router, if it has gates."""
        del gates
        return self


def is_weight(x: Any) -> bool:
    """Whether `x` is a form. Plain arrays are weights too, but leaves of the tree."""
    return isinstance(x, Weight)


def is_stored(x: Any) -> bool:
    """Whether `x` is a form that stores a kernel, such as codes, and adds nothing to it."""
    return is_weight(x) and x.stored


def dot(x: jax.Array, w: Any) -> jax.Array:
    """`x[..., in] @ w[in, out]` in the dtype of `x`, for a form or a plain array."""
    return name_product(w.dot(x) if is_weight(w) else half_precision_matmul.matmul(x, w))


def dot_to_float32(x: jax.Array, w: Any, axis: int = 0) -> jax.Array:
    """`dot(x, w)` before it is rounded: in float32 for half-precision `x`, otherwise in the dtype of `x`.

    `axis` is the axis of `w` to sum over: 1 for an embedding `[vocab, width]`. The result has no checkpoint name, so
    that no policy saves it in float32.
    """
    if is_weight(w):
        return w.dot_transposed_to_float32(x) if axis else w.dot_to_float32(x)
    return half_precision_matmul.matmul_to_float32(x, w, axis)


def affine(x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
    """`dot(x, w) + bias`; `bias` may be None."""
    if bias is None:
        return dot(x, w)
    return name_product(w.affine(x, bias)) if is_weight(w) else _add_bias(dot(x, w), bias)


def affine_to_float32(x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
    """`affine(x, w, bias)` before it is rounded, as `dot_to_float32`."""
    if bias is None:
        return dot_to_float32(x, w)
    return w.affine_to_float32(x, bias) if is_weight(w) else _add_bias(dot_to_float32(x, w), bias)


def grouped(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """`x[i] @ w[g]` for `w: [G, in, out]` and rows `x: [rows, in]` sorted by group, `sizes: [G]` of each group."""
    return name_product(w.grouped(x, sizes) if is_weight(w) else ragged_dot(x, w.astype(x.dtype), sizes))


def grouped_to_float32(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """`grouped(x, w, sizes)` before it is rounded, as `dot_to_float32`."""
    if is_weight(w):
        return w.grouped_to_float32(x, sizes)
    return ragged_dot(x, w.astype(x.dtype), sizes, at_least_float32(x).dtype)


def take(w: Any, ids: jax.Array) -> jax.Array:
    """The rows `ids` of an embedding `[vocab, width]`."""
    return w.take(ids) if is_weight(w) else jnp.take(w, ids, axis=0)


def with_gates(params: PyTree, gates: jax.Array) -> PyTree:
    """The parameters of a layer, with its gates set in every form that takes them."""
    return jax.tree.map(lambda w: w.with_gates(gates) if is_weight(w) else w, params, is_leaf=is_weight)


def materialize(w: Any) -> jax.Array:
    """The kernel of a form or a plain array, as a plain array."""
    return w.materialize() if is_weight(w) else w


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, the dtype of updates and norms, or in float64 if it is float64, for exact references."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def name_product(y: jax.Array) -> jax.Array:
    """`y` with the checkpoint name PRODUCT, so that remat=dots saves it if a gradient needs it."""
    return checkpoint_name(y, PRODUCT)


def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias` in the dtype of `y`, added in float32, in which the gradient of the bias is summed."""
    wide = at_least_float32(y)
    return (wide + jnp.broadcast_to(bias.astype(wide.dtype), y.shape)).astype(y.dtype)


def merge(params: PyTree) -> PyTree:
    """The parameter tree with every form replaced by its kernel, and the bias beside it by the merged bias."""
    if not isinstance(params, dict):
        return materialize(params)
    merged = {name: merge(child) for name, child in params.items()}
    if is_weight(params.get("kernel")) and "bias" in params:
        merged["bias"] = params["kernel"].merged_bias(params["bias"])
    return merged


Rewrite = Callable[[jax.Array, Any, str], Any]  # (key, weight, name) -> weight


def rewrite(params: PyTree, rules: Sequence[tuple[str, Rewrite]], key: jax.Array) -> PyTree:
    """The parameter tree with each rule applied to the weights whose whole names its regex matches.

    Rules apply in order, so later rules wrap the forms of earlier ones. A weight's random key depends on the rule's
    index and on the weight's name only, so another weight does not change its initial values. Raises UserError for a
    rule that matches no weight.
    """
    for i, (pattern, fn) in enumerate(rules):
        matches = set(tree.match_names(pattern, tree.leaf_names(params, is_weight), "target"))
        rule_key = jax.random.fold_in(key, i)
        params = tree.map_named(
            lambda n, w, fn=fn, k=rule_key, matches=matches: fn(name_key(k, n), w, n) if n in matches else w,
            params,
            is_leaf=is_weight,
        )
    return params


def name_key(key: jax.Array, name: str) -> jax.Array:
    """A random key derived from `key` and a leaf's name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def declared_mask(params: PyTree, train: Sequence[str] = ()) -> PyTree:
    """A tree of bools: True for the fields that forms declare trainable, and for the leaves that `train` matches.

    Raises UserError for a leaf that `train` matches if it holds integers or if its form declares it frozen.
    """
    chosen = {n: p for p in train for n in tree.match_names(p, tree.leaf_names(params), "train pattern")}
    fields_mask = functools.partial(map_fields, lambda field, _: field.metadata["trainable"])
    declared = jax.tree.map(lambda w: fields_mask(w) if is_weight(w) else None, params, is_leaf=is_weight)
    declared = dict(tree.named_leaves(declared))
    mask = tree.map_named(lambda n, _: declared.get(n, False) or n in chosen, params)
    for (name, leaf), learns in zip(tree.named_leaves(params), jax.tree.leaves(mask), strict=True):
        if learns and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(
                f"leaf {name} has dtype {leaf.dtype}, and only floating-point leaves can be trained: leave it out of "
                "the train patterns"
            )
    for name in chosen:
        if not declared.get(name, True):
            raise UserError(
                f"the train pattern {chosen[name]!r} matches {name}, which its form keeps frozen: narrow the pattern"
            )
    return mask


def map_fields(fn: Callable[[dataclasses.Field[Any], Any], Any], w: Any) -> Any:
    """The form `w` with `fn(field, array)` in place of each array, including the arrays of nested forms."""
    values = {}
    for field in dataclasses.fields(w):
        if field.metadata.get("static"):
            continue
        value = getattr(w, field.name)
        nested = dataclasses.is_dataclass(value)
        values[field.name] = map_fields(fn, value) if nested else jax.tree.map(functools.partial(fn, field), value)
    return dataclasses.replace(w, **values)
