"""An adapted model as a plain Hugging Face checkpoint, and the error of the adapter's update in that dtype."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import pretrained
from lowrank.core import files, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import PathLike, as_local_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import Weight, is_stored, is_weight, materialize
from lowrank.pretrained import Pretrained
from lowrank.pretrained.load import PARAM_DTYPES
from lowrank.pretrained.quantize_config import build_rounding

Rounding = Callable[[np.ndarray], np.ndarray]
CODES = ("dequantize", "requantize")  # a merged kernel on codes: its values, or these values quantized again


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The error of the stored kernels W': `||W' - W - dW|| / ||dW||` (Frobenius), of all matrices and of the worst.

    W is the loaded base and dW the update of the adapter. Only the matrices that the adapter changes are counted, by
    more than the rounding of a DoRA's magnitude.
    """

    dtype: str
    matrices: int
    error: float
    worst: float
    worst_matrix: str

    def __str__(self) -> str:
        """One line for people."""
        worst = f", at worst {self.worst:.2e} in {self.worst_matrix}" if self.matrices else ""
        return (
            f"merged {self.matrices} matrices into {self.dtype}: relative error of the update {self.error:.2e}{worst}"
        )


def merge_to_hf(
    params: PyTree,
    base: Pretrained,
    directory: PathLike,
    *,
    dtype: str = "float32",
    labels: Sequence[str] = (),
    codes: str = "dequantize",
) -> MergeReport:
    """Writes `params`, the adapted tree of `base`, as a full checkpoint with its kernels stored in `dtype`.

    `labels` name a classifier's classes; `codes` is as for `merged`. Raises UserError as `pretrained.export` does.
    """
    directory = as_local_path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory")
    forms = {type(w).__name__ for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w) and not is_stored(w)}
    if dtype in PARAM_DTYPES:
        files.require_space(directory, plain_bytes(params, dtype))
    plain, report = merged(params, dtype, _requantized(base) if check_codes(codes) == "requantize" else None)
    made = f"A merge of {' and '.join(sorted(forms)) or 'trained leaves'} into a copy"
    pretrained.export(plain, base, directory, dtype=dtype, labels=labels, made=made)
    return report


def plain_bytes(params: PyTree, dtype: str) -> int:
    """The bytes of the tensors of `params`, each form as its kernel, in a file."""
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    return sum(math.prod(w.shape) for w in leaves) * jnp.dtype(dtype).itemsize


def check_codes(codes: str) -> str:
    """Returns `codes`, one of CODES. Raises UserError for another value."""
    if codes not in CODES:
        raise unknown("merge into a quantized base", codes, CODES)
    return codes


def _requantized(base: Pretrained) -> Rounding:
    if not base.quantized:
        raise UserError(f"{base.name} was read without model.quantize, whose scheme the merge needs")
    again = build_rounding({k: v for k, v in base.quantized.items() if k != "param_dtype"})
    return lambda kernel: np.asarray(again.form(jnp.asarray(kernel, jnp.float32), "float32").materialize())


def merged(params: PyTree, dtype: str, requantize: Rounding | None = None) -> tuple[PyTree, MergeReport]:
    """`params` with each form replaced by its kernel in `dtype`, and the error of that.

    The exact sum is computed in float64, one layer at a time, and rounded once. Kernels in codes become the values of
    their codes. `requantize` rounds the sum with an adapter to the values of codes, and the report includes that error.
    Raises UserError for an unknown dtype.
    """
    if dtype not in PARAM_DTYPES:
        raise unknown("dtype", dtype, PARAM_DTYPES)
    leaves, errors = dict(tree.named_leaves(params, is_weight)), {}
    for name, w in list(leaves.items()):
        if is_weight(w):
            leaves[name], norms = _merged(w, dtype, requantize)
            errors |= {_layer_name(name, i, len(norms)): pair for i, pair in enumerate(norms)}
            bias = f"{name.removesuffix('kernel')}bias"
            if bias in leaves:
                leaves[bias] = w.merged_bias(leaves[bias])
    return tree.map_named(lambda name, _: leaves[name], params, is_leaf=is_weight), _report(dtype, errors)


def _merged(w: Weight, dtype: str, requantize: Rounding | None) -> tuple[jax.Array, list[tuple[float, float]]]:
    """`(kernel [..., in, out] in dtype, [(||W' - W - dW||, ||dW||) per layer])`; float32 rounding does not count."""
    stack = w.shape[:-2]
    again = requantize if not is_stored(w) and is_stored(innermost(w)) and not hasattr(w, "absorbed") else None
    stored, norms = [], []
    for i in range(stack[0]) if stack else (...,):
        base, exact = exact_kernels(jax.tree.map(lambda x, i=i: x[i], w))
        kernel = (again(exact) if again else exact).astype(jnp.dtype(dtype))
        stored.append(kernel)
        change = _norm(exact - base)
        norms.append((_norm(kernel.astype(np.float64) - exact), change if change > 1e-6 * _norm(base) else 0.0))
    return jnp.asarray(np.stack(stored) if stack else stored[0]), norms


def innermost(w: Any) -> Any:
    """The kernel under all forms of a weight."""
    return innermost(w.base) if hasattr(w, "base") else w


def exact_kernels(w: Weight) -> tuple[np.ndarray, np.ndarray]:
    """`(kernel without the form, kernel with the form)` of one layer, in float64."""
    arrays = jax.tree.map(np.asarray, w)
    with jax.enable_x64(True):
        lift = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)  # noqa: E731
        w = jax.tree.map(lift, arrays)
        return jax.tree.map(np.asarray, _without_and_with(w))


@jax.jit
def _without_and_with(w: Weight) -> tuple[jax.Array, jax.Array]:
    return materialize(getattr(w, "base", w)), w.materialize()


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.sum(x * x)))


def _layer_name(name: str, layer: int, layers: int) -> str:
    first, _, rest = name.partition("/")
    return f"{first}/{layer}/{rest}" if layers > 1 else name


def _report(dtype: str, errors: Mapping[str, tuple[float, float]]) -> MergeReport:
    changed = {name: pair for name, pair in errors.items() if pair[1] > 0}
    if not changed:
        return MergeReport(dtype, 0, 0.0, 0.0, "")
    lost, size = (float(np.sqrt(sum(pair[k] ** 2 for pair in changed.values()))) for k in (0, 1))
    worst = max(changed, key=lambda name: changed[name][0] / changed[name][1])
    return MergeReport(dtype, len(changed), lost / size, changed[worst][0] / changed[worst][1], worst)
