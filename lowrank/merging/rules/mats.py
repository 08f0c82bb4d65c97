"""MaTS (Tam et al. 2024, arXiv:2312.04339): a merged kernel as the solution of a linear system, by conjugate gradient.

sum of G_i W H_i = sum of G_i W_i H_i, with the Gram matrices G_i `[in, in]` of the inputs of model i and H_i
`[out, out]` of the gradients by its outputs, the identity where there are none. The iteration starts from the mean.
Tensors without a Gram matrix are averaged.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lowrank.merging.blocks import combine
from lowrank.merging.rule import Group, Option, Rule, count, number


def conjugate_gradient(
    operator: Callable[[np.ndarray], np.ndarray], right: np.ndarray, start: np.ndarray, steps: int, tol: float
) -> np.ndarray:
    """The solution of `operator(x) = right`, after at most `steps`, or once the residual is `tol` of `right`."""
    x = start.astype(np.float64)
    residual = right - operator(x)
    direction, size = residual, float(np.vdot(residual, residual))
    goal = (tol * float(np.linalg.norm(right))) ** 2
    for _ in range(steps):
        if size <= goal:
            break
        image = operator(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        x = x + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        size, last = float(np.vdot(residual, residual)), size
        direction = residual + (size / last) * direction
    return x


def solve_kernel(
    kernels: Sequence[np.ndarray],
    grams: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray | None],
    start: np.ndarray,
    steps: int,
    tol: float,
) -> np.ndarray:
    """The merged kernel `[in, out]` in float64."""

    def term(g: np.ndarray, w: np.ndarray, h: np.ndarray | None) -> np.ndarray:
        return g @ w if h is None else g @ w @ h

    def operator(w: np.ndarray) -> np.ndarray:
        return np.asarray(sum(term(g, w, h) for g, h in zip(grams, outputs, strict=True)))

    right = sum(term(g, w, h) for g, w, h in zip(grams, kernels, outputs, strict=True))
    return conjugate_gradient(operator, np.asarray(right), start, steps, tol)


def _merge(group: Group) -> np.ndarray:
    n = len(group.tensors)
    if not all("gram" in s for s in group.statistics):
        return combine(group.tensors, [1 / n] * n)
    flipped = group.input_axis == 1
    kernels = [(x.T if flipped else x).astype(np.float64) for x in group.tensors]
    start = np.mean(kernels, axis=0)
    grams = [s["gram"].astype(np.float64) for s in group.statistics]
    merged = solve_kernel(
        kernels,
        grams,
        [s.get("output_gram") for s in group.statistics],
        start,
        group.shared["max_iter"],
        group.shared["tol"],
    )
    return merged.T if flipped else merged


MATS = Rule(
    merge=_merge,
    options={"max_iter": Option(count, 100), "tol": Option(number, 1e-8)},
    least=2,
    statistics="gram",
)
