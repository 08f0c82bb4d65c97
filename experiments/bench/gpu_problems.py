"""The products that the benchmarks of accelerators time: inputs, forms to compare, and float64 references.

Shapes: T rows, d inputs, k outputs, r rank, n adapters, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import dot, materialize
from lowrank.kernels import cross_entropy
from lowrank.kernels.four_bit_matmul import dispatch
from lowrank.kernels.grouped_lora.dispatch import grouped_lora
from lowrank.kernels.lora_matmul.dispatch import lora_matmul
from lowrank.weights.lora import LoRA
from lowrank.weights.quantized.schemes import SCHEMES

SCALE = 2.0
OURS, BODY = "ours", "pallas_gpu"  # the form that users get, and the Pallas body, which no GPU may have checked
Arrays = tuple[Any, ...]


class Problem(NamedTuple):
    """An operation at one size. `learned` are the indices of the inputs that get a gradient."""

    inputs: Callable[[jax.Array], Arrays]  # from a key
    forms: Mapping[str, Callable[..., jax.Array]]  # OURS is the package's own
    exact: Callable[..., tuple[np.ndarray, ...]]  # (*inputs, g) in float64 -> (result, gradients of the learned inputs)
    learned: Sequence[int]


def lora(T: int, d: int, k: int, r: int) -> Problem:
    """`x W + s (x A) B`: the strongest form in plain JAX may be that with K concatenated, `[x | s xA] [W; B]`."""

    def ours(x, w, a, b):
        return dot(x, LoRA(base=w, a=a, b=b, scale=jnp.float32(SCALE)))

    def plain(x, w, a, b):
        return x @ w + SCALE * (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

    def concatenated(x, w, a, b):
        low = SCALE * (x @ a.astype(x.dtype))
        return jnp.concatenate([x, low], axis=-1) @ jnp.concatenate([w, b.astype(w.dtype)], axis=0)

    def exact(x, w, a, b, g):
        up = SCALE * g @ b.T
        return x @ w + SCALE * (x @ a) @ b, g @ w.T + up @ a.T, x.T @ up, SCALE * (x @ a).T @ g

    def inputs(key):
        x, w, a, b = (_normal(key, i, *shape) for i, shape in enumerate(((T, d), (d, k), (d, r), (r, k))))
        return x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), a, b

    def body(x, w, a, b):
        return lora_matmul(x, w, a, b, jnp.float32(SCALE), implementation=BODY)

    forms = {OURS: ours, "plain": plain, "concatenated": concatenated, BODY: body}
    return Problem(inputs, forms, exact, (0, 2, 3))


def four_bits(scheme: str, T: int, d: int, k: int) -> Problem:
    """`x W` of a kernel in 4-bit codes, against decoding it first."""

    def inputs(key):
        return _normal(key, 0, T, d).astype(jnp.bfloat16), SCHEMES[scheme]()(_normal(key, 1, d, k).astype(jnp.bfloat16))

    def exact(x, w, g):
        return x @ w, g @ w.T

    def body(x, w):
        return w.dot_in(x, x.dtype, BODY)

    forms = {OURS: dot, "decoded first": lambda x, w: x @ materialize(w)}
    return Problem(inputs, {**forms, BODY: body} if T <= dispatch.ROWS else forms, exact, (0,))


def adapters(T: int, d: int, k: int, r: int, n: int) -> Problem:
    """`(x A_i) B_i` where each row has an adapter `i` of its own: gathered, masked and grouped forms."""

    def ours(x, a, b, ids, implementation="auto"):
        return grouped_lora(x, jnp.swapaxes(a, 1, 2), b, jnp.ones(n), ids, implementation)

    def gathered(x, a, b, ids):
        return jnp.einsum("tr,trk->tk", jnp.einsum("td,tdr->tr", x, a[ids]), b[ids])

    def masked(x, a, b, ids):
        low = x @ jnp.moveaxis(a, 0, 1).reshape(d, n * r)
        own = (jnp.arange(n * r) // r)[None] == ids[:, None]
        return jnp.where(own, low, 0) @ b.reshape(n * r, k)

    def grouped(x, a, b, ids):
        order, sizes = jnp.argsort(ids), jnp.bincount(ids, length=n)
        rows = jax.lax.ragged_dot(jax.lax.ragged_dot(x[order], a, sizes), b, sizes)
        return jnp.zeros_like(rows).at[order].set(rows)

    def exact(x, a, b, ids, g):
        y, dx, da, db = np.zeros_like(g), np.zeros_like(x), np.zeros_like(a), np.zeros_like(b)
        for i in range(n):
            own = ids == i
            y[own], dx[own] = x[own] @ a[i] @ b[i], g[own] @ b[i].T @ a[i].T
            da[i], db[i] = x[own].T @ (g[own] @ b[i].T), (x[own] @ a[i]).T @ g[own]
        return y, dx, da, db

    def inputs(key):
        shapes = ((T, d), (n, d, r), (n, r, k))
        drawn = (_normal(key, i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
        return *drawn, jax.random.randint(key, (T,), 0, n)

    forms = {OURS: ours, "gathered": gathered, "masked": masked, "ragged_dot": grouped}
    return Problem(inputs, {**forms, BODY: functools.partial(ours, implementation=BODY)}, exact, (0, 1, 2))


def head_loss(T: int, d: int, V: int) -> Problem:
    """Cross-entropy of a frozen head: with all logits at once, and in chunks whose gradient the forward pass makes."""

    def ours(h, w, targets):
        return cross_entropy.chunked_nll(lambda x: x @ w, h[None], targets[None], jnp.ones((1, T)), 1024)

    def whole(h, w, targets):
        return jnp.sum(cross_entropy.token_nll(h @ w, targets))

    def exact(h, w, targets, g):
        logits = h @ w
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        shares, own = shifted / shifted.sum(-1, keepdims=True), np.arange(T)
        loss = -np.log(shares[own, targets]).sum()
        shares[own, targets] -= 1
        return loss, g * shares @ w.T

    def inputs(key):
        h, w = _normal(key, 0, T, d).astype(jnp.bfloat16), _normal(key, 1, d, V).astype(jnp.bfloat16)
        return h, w, jax.random.randint(key, (T,), 0, V)

    return Problem(inputs, {OURS: ours, "whole": whole}, exact, (0,))


def _normal(key: jax.Array, index: int, *shape: int) -> jax.Array:
    """Values of mean 0 whose products with rows of such values stay near 1."""
    scale = shape[-2] ** -0.5 if index else 1.0
    return scale * jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)


# Sizes for the comparison with float64: odd, and ranks of 1 and 33.
CHECKS: dict[str, Problem] = {
    "lora": lora(100, 192, 320, 7),
    "lora rank 1": lora(64, 128, 256, 1),
    "nf4": four_bits("nf4", 33, 192, 320),
    "int4": four_bits("int4", 33, 192, 320),
    "adapters": adapters(70, 96, 160, 5, 6),
    "head loss": head_loss(50, 64, 1000),
}
PROBLEMS: dict[str, Problem] = {
    "lora 8192x4096x4096 r16": lora(8192, 4096, 4096, 16),
    "lora 8192x4096x14336 r16": lora(8192, 4096, 14336, 16),
    "lora 8192x14336x4096 r16": lora(8192, 14336, 4096, 16),
    "lora 8192x2048x2048 r16": lora(8192, 2048, 2048, 16),
    "lora 8192x4096x4096 r64": lora(8192, 4096, 4096, 64),
    "nf4 16x4096x14336": four_bits("nf4", 16, 4096, 14336),
    "nf4 64x4096x4096": four_bits("nf4", 64, 4096, 4096),
    "nf4 8192x4096x4096": four_bits("nf4", 8192, 4096, 4096),
    "nf4 8192x4096x14336": four_bits("nf4", 8192, 4096, 14336),
    "int4 8192x4096x14336": four_bits("int4", 8192, 4096, 14336),
    "adapters 256x4096x4096 r16 n64": adapters(256, 4096, 4096, 16, 64),
    "adapters 8192x4096x4096 r16 n256": adapters(8192, 4096, 4096, 16, 256),
    "head loss 8192x4096x128256": head_loss(8192, 4096, 128256),
}


def forward_and_backward(problem: Problem, form: Callable[..., jax.Array]) -> Callable[..., Arrays]:
    """`(*inputs, g) -> (result, gradients of the learned inputs)`, for a cotangent `g` of the result's shape."""

    def both(*given):
        *inputs, g = given

        def of_learned(*learned):
            changed = dict(zip(problem.learned, learned, strict=True))
            return form(*(changed.get(i, x) for i, x in enumerate(inputs)))

        y, pullback = jax.vjp(of_learned, *(inputs[i] for i in problem.learned))
        return (y, *pullback(g.astype(y.dtype)))

    return both


def cotangent(problem: Problem, inputs: Arrays, key: jax.Array) -> jax.Array:
    """Random values in the shape of the result."""
    y = jax.eval_shape(next(iter(problem.forms.values())), *inputs)
    return jax.random.normal(key, y.shape, y.dtype)
