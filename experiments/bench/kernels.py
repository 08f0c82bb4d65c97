"""The operations whose speed depends on how they are written: their sizes, their forms, and float64 references.

One table for every benchmark of kernels. The form `xla` is the strongest one in plain JAX, which the others are
measured against; a Pallas body has the name of its implementation; the other forms are for comparison.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import dot, dot_to_float32
from lowrank.kernels.cross_entropy import chunked_nll, token_nll
from lowrank.kernels.grouped_lora import plain, tpu
from lowrank.kernels.grouped_lora.dispatch import grouped_lora
from lowrank.kernels.lora_matmul import plain as lora_plain
from lowrank.kernels.lora_matmul.dispatch import lora_matmul
from lowrank.methods.projections import Shape, fastfood, fastfood_blocks, walsh
from lowrank.weights import dora
from lowrank.weights.lora import LoRA
from lowrank.weights.quantized.schemes import SCHEMES

PROJECTION = 7  # the seed of its random numbers
LOGITS = 1024  # the tokens whose logits exist at a time
Size = Mapping[str, int]


class Kernel(NamedTuple):
    """An operation.

    Attributes:
      arguments: the arrays of a size, from a key; a list of trees.
      forms: name -> function of the arrays.
      reference: the result in float64, of the same arrays on the host.
      sizes: the sizes to measure.
    """

    arguments: Callable[..., list[Any]]
    forms: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    sizes: Sequence[Size]

    def shapes(self, size: Size) -> list[Any]:
        """The arguments as shapes and dtypes."""
        return jax.eval_shape(functools.partial(self.arguments, **size), jax.random.key(0))


def _normal(key: jax.Array, *shapes: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    keys = jax.random.split(key, len(shapes))
    return [(jax.random.normal(k, s) * scale).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def _wide(*trees: Any) -> list[Any]:
    return [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in trees]


def _grouped(key: jax.Array, rows: int, adapters: int, rank: int, inputs: int, outputs: int) -> list[Any]:
    x, a, b = _normal(key, (rows, inputs), (adapters, rank, inputs), (adapters, rank, outputs), scale=inputs**-0.25)
    return [x, a, b, jnp.ones(adapters), jax.random.randint(key, (rows,), 0, adapters)]


def _lora(key: jax.Array, rows: int, inputs: int, outputs: int, rank: int, layers: int = 0) -> list[Any]:
    stack = (layers,) if layers else ()
    x, w, a, b = _normal(
        key, (rows, inputs), (*stack, inputs, outputs), (*stack, inputs, rank), (*stack, rank, outputs)
    )
    w, a = (v * v.shape[-2] ** -0.5 for v in (w, a))
    return [x, w, a.astype(jnp.float32), b.astype(jnp.float32), jnp.full(stack, 0.25)]


def _separate(x: jax.Array, *others: jax.Array) -> jax.Array:
    return lora_plain.multiply(x, *others, dtype=x.dtype)[0]


def _lora_and_cotangent(key: jax.Array, rows: int, inputs: int, outputs: int, rank: int) -> list[Any]:
    return [*_lora(key, rows, inputs, outputs, rank), *_normal(jax.random.fold_in(key, 1), (rows, outputs))]


def _lora_gradient(multiply: Callable[..., Any], x: Any, w: Any, a: Any, b: Any, scale: Any, g: Any) -> Any:
    """The gradients of the rows, A and B."""
    return jax.vjp(lambda x, a, b: multiply(x, w, a, b, scale), x, a, b)[1](g)


def _lora_gradient_reference(*arrays: Any) -> Any:
    x, w, a, b, scale, g = _wide(*arrays)
    u = scale * g @ b.T
    return g @ w.T + u @ a.T, x.T @ u, scale * (x @ a).T @ g


def _lora_layers(multiply: Callable[..., Any], x: jax.Array, *stacks: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, layer: (multiply(x, *layer), None), x, stacks)[0]


def _lora_reference(x: Any, w: Any, a: Any, b: Any, scale: Any) -> np.ndarray:
    x, w, a, b, scale = _wide(x, w, a, b, scale)
    for layer in zip(w, a, b, scale, strict=True) if w.ndim > 2 else [(w, a, b, scale)]:
        x = x @ layer[0] + layer[3] * (x @ layer[1]) @ layer[2]
    return x


def _gather(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    s = jnp.einsum("ti,tri->tr", x, a[ids]) * scale[ids][:, None].astype(x.dtype)
    return jnp.einsum("tr,tro->to", s, b[ids])


def _grouped_reference(x: Any, a: Any, b: Any, scale: Any, ids: Any) -> np.ndarray:
    (x, a, b), ids = _wide(x, a, b), np.asarray(ids)
    out = np.zeros((len(x), b.shape[2]))
    for g in range(len(a)):
        out[ids == g] = float(scale[g]) * (x[ids == g] @ a[g].T) @ b[g]
    return out


def _codes(key: jax.Array, scheme: str, rows: int, inputs: int, outputs: int, backward: bool = False) -> list[Any]:
    x, w = _normal(key, (rows, outputs if backward else inputs), (inputs, outputs), scale=inputs**-0.25)
    return [x, SCHEMES[scheme]()(w)]


def _dot_gradient(g: jax.Array, w: Any) -> jax.Array:
    return jax.vjp(lambda x: dot(x, w), jnp.zeros((len(g), w.shape[0]), g.dtype))[1](g)[0]


def _four_bit(scheme: str, backward: bool) -> Kernel:
    """A product of many rows and codes, or the gradient of the rows."""
    axis = int(backward)
    tiled = lambda x, w: w.dot_in(x, x.dtype, "xla")  # noqa: E731
    whole = lambda x, w: jax.lax.dot_general(x, w.materialize(), (((1,), (axis,)), ((), ())))  # noqa: E731
    exact = lambda x, w: np.tensordot(*_wide(x, w.materialize()), axes=((1,), (axis,)))  # noqa: E731
    return Kernel(
        functools.partial(_codes, scheme=scheme, backward=backward),
        {"xla": _dot_gradient if backward else tiled, "materialized": whole},
        exact,
        [{"rows": 8192, "inputs": i, "outputs": o} for i, o in ((4096, 14336), (14336, 4096))],
    )


def _few_rows(scheme: str) -> Kernel:
    """A product of few rows and codes, as in decoding."""
    body = lambda x, w: w.dot_in(x, x.dtype, "pallas_tpu")  # noqa: E731
    product = _four_bit(scheme, backward=False)
    forms = {**product.forms, "pallas_tpu": body}
    sizes = [{**size, "rows": n} for size in product.sizes for n in (1, 16, 64)]
    return product._replace(forms=forms, sizes=sizes)


def _tokens(key: jax.Array, batch: int, time: int, width: int, vocabulary: int) -> list[Any]:
    h, head = _normal(key, (batch, time, width), (width, vocabulary), scale=width**-0.25)
    return [h, head, jax.random.randint(key, (batch, time), 0, vocabulary), jnp.ones((batch, time))]


def _chunked(h: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    loss = lambda h: chunked_nll(lambda x: dot_to_float32(x, head), h, targets, weights, LOGITS)  # noqa: E731
    return jax.value_and_grad(loss)(h)


def _at_once(h: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    return jax.value_and_grad(lambda h: jnp.sum(weights * token_nll(dot_to_float32(h, head), targets)))(h)


def _cross_entropy_reference(h: Any, head: Any, targets: Any, weights: Any) -> Any:
    h, head, weights = _wide(h, head, weights)
    logits = h @ head
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hit = np.asarray(targets)[..., None] == np.arange(head.shape[1])
    return -np.sum(weights * np.log(np.sum(p * hit, -1))), ((p - hit) * weights[..., None]) @ head.T


def _adapted(key: jax.Array, inputs: int, outputs: int, rank: int) -> list[Any]:
    w, a, b = _normal(key, (inputs, outputs), (inputs, rank), (rank, outputs), scale=inputs**-0.5)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return [dora.attach(LoRA(base=w, a=a, b=b, scale=jnp.float32(2)))]


def _naive_norm(w: Any) -> jax.Array:
    return jnp.linalg.norm(w.base.astype(jnp.float32) + w.scale * (w.a @ w.b), axis=0)


def _norm_reference(w: Any) -> np.ndarray:
    base, a, b = _wide(w.base, w.a, w.b)
    return np.linalg.norm(base + float(w.scale) * a @ b, axis=0)


def _butterfly(x: np.ndarray) -> np.ndarray:
    rows, n = x.shape
    step = 1
    while step < n:
        pairs = x.reshape(rows, -1, 2, step)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(rows, n)
        step *= 2
    return x


def _moved_by_vector(w: jax.Array, x: jax.Array) -> jax.Array:
    """A kernel and the Fastfood projection of a few numbers, as intrinsic dimension adds them in each step."""
    return w + fastfood(jax.random.key(PROJECTION), x, Shape(w.size, w.size)).reshape(w.shape).astype(w.dtype)


def _moved_by_vector_reference(w: Any, x: Any) -> np.ndarray:
    signs, places, gauss = _wide(*fastfood_blocks(jax.random.key(PROJECTION), w.size, x.size))
    blocks = np.arange(len(signs))
    mixed = _butterfly(signs * np.pad(_wide(x)[0], (0, signs.shape[1] - x.size)))
    ordered = np.take_along_axis(mixed, places.astype(int)[blocks % len(places)], axis=1)
    scale = np.linalg.norm(gauss, axis=1, keepdims=True) * w.size**0.5
    return _wide(w)[0] + (_butterfly(ordered * gauss) / scale).reshape(-1)[: w.size].reshape(w.shape)


LORA = {
    "xla": functools.partial(lora_matmul, implementation="xla"),
    "separate": _separate,
    "pallas_tpu": functools.partial(lora_matmul, implementation="pallas_tpu"),
}
SQUARE = {"rows": 8192, "inputs": 4096, "outputs": 4096, "rank": 16}
GROUPED = [(256, 64, 16), (256, 256, 16), (8192, 16, 16), (8192, 256, 16), (8192, 4, 512)]  # rows, adapters, rank
KERNELS: dict[str, Kernel] = {
    "lora_product": Kernel(
        _lora,
        LORA,
        _lora_reference,
        [SQUARE, {**SQUARE, "outputs": 14336}, {**SQUARE, "inputs": 14336}, {**SQUARE, "rank": 64}],
    ),
    "lora_gradient": Kernel(
        _lora_and_cotangent,
        {name: functools.partial(_lora_gradient, form) for name, form in LORA.items()},
        _lora_gradient_reference,
        [SQUARE, {**SQUARE, "outputs": 14336}],
    ),
    "lora_layers": Kernel(
        _lora,
        {name: functools.partial(_lora_layers, form) for name, form in LORA.items()},
        _lora_reference,
        [{**SQUARE, "layers": 2}],
    ),
    "grouped_lora": Kernel(
        _grouped,
        {
            "xla": functools.partial(grouped_lora, implementation="xla"),
            "masked": plain.multiply_masked,
            "sorted": plain.multiply_sorted,
            "gather": _gather,
            "pallas_tpu": tpu.multiply,
        },
        _grouped_reference,
        [{"rows": t, "adapters": n, "rank": r, "inputs": 4096, "outputs": 4096} for t, n, r in GROUPED],
    ),
    **{f"{s}_decoding": _few_rows(s) for s in ("nf4", "int4")},
    **{f"{s}_product": _four_bit(s, backward=False) for s in ("nf4", "int4")},
    **{f"{s}_gradient": _four_bit(s, backward=True) for s in ("nf4", "int4")},
    "cross_entropy": Kernel(
        _tokens,
        {"xla": _chunked, "at_once": _at_once},
        _cross_entropy_reference,
        [{"batch": 8, "time": 1024, "width": 4096, "vocabulary": 128256}],
    ),
    "dora_norm": Kernel(
        _adapted,
        {"xla": lambda w: w.column_norm(), "naive": _naive_norm},
        _norm_reference,
        [{"inputs": 4096, "outputs": 4096, "rank": 16}, {"inputs": 4096, "outputs": 14336, "rank": 64}],
    ),
    "hadamard": Kernel(
        lambda key, n: _normal(key, (1, n), dtype=jnp.float32),
        {"xla": walsh},
        lambda x: _butterfly(_wide(x)[0]),
        [{"n": 1 << 20}],
    ),
    "fastfood": Kernel(
        lambda key, inputs, outputs, width: _normal(key, (inputs, outputs), (width,), dtype=jnp.float32),
        {"xla": _moved_by_vector},
        _moved_by_vector_reference,
        [{"inputs": 4096, "outputs": 4096, "width": 1024}],
    ),
}
