"""What some rules of merging ask of data: the Fisher information of weights, and the Gram matrices of kernels.

`loss(params, batch)` is the negative log-likelihood of a batch in nats, summed, and the sum of its weights; models that
share one loss, and one function that draws, share the compiled program. A batch holds `segments` int32 `[B, T]`, 0 for
padding. Shapes: B rows, T tokens, L layers.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lowrank.core import files, tree
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, HostArrays, Network, PyTree
from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot_to_float32,
    form,
    frozen,
    is_weight,
    materialize,
    trainable,
)
from lowrank.pretrained.hf_tensors import Tensor

OUTPUT_GRAM = ".output_gram"  # ends the name of the Gram matrix of the gradients by a kernel's outputs
Loss = Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]]
Draw = Callable[[PyTree, Batch, jax.Array], Batch]  # (params, batch, key) -> the batch with labels of the model's own
Chosen = Callable[[str], bool]  # whether a leaf of this name is measured


def is_layer_kernel(name: str, leaf: Any) -> bool:
    """Whether a leaf is the kernels `[L, in, out]` of a stack of layers; those of experts have one axis more."""
    return name.split("/")[0] in tree.STACKS and name.endswith("/kernel") and len(leaf.shape) == 3


def fisher(
    loss: Loss, params: PyTree, batches: Iterable[Batch], *, draw: Draw | None = None, chosen: Chosen = bool
) -> HostArrays:
    """The diagonal of the Fisher information of the leaves that are `chosen`, by leaf name, in float32.

    It is the mean, over the rows that have a weight, of the squared gradient of a row's log-likelihood, one row at a
    time (Matena and Raffel 2022, arXiv:2111.09832). `draw` replaces a row's labels by labels of the model's own
    distribution; without it, this is the empirical Fisher of the labels given. `params` are plain arrays. Raises
    UserError for batches without a weight.
    """
    measured, rest = tree.split(params, tree.map_named(lambda name, _: chosen(name), params))
    total, count, key = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), measured), 0.0, jax.random.key(0)
    for i, batch in enumerate(batches):
        total, rows = _add_squares(loss, draw, total, measured, rest, dict(batch), jax.random.fold_in(key, i))
        count += float(rows)
    if not count:
        raise UserError("the data of the statistics hold no token that is learned: name other data")
    return {name: np.asarray(x) / np.float32(count) for name, x in tree.named_leaves(total)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_squares(
    loss: Loss, draw: Draw | None, total: PyTree, measured: PyTree, rest: PyTree, batch: Batch, key: jax.Array
) -> tuple[PyTree, jax.Array]:
    """`(total plus the squared gradient of each row, number of rows that have a weight)`."""

    def of_row(measured: PyTree, row: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = tree.join(measured, rest)
        return loss(params, draw(jax.lax.stop_gradient(params), row, key) if draw else row)

    def step(total: PyTree, item: tuple[Batch, jax.Array]) -> tuple[PyTree, jax.Array]:
        row = jax.tree.map(lambda x: x[None], item[0])
        gradient, weight = jax.grad(of_row, has_aux=True)(measured, row, item[1])
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, gradient), weight > 0

    rows = len(batch["segments"])
    total, learned = jax.lax.scan(step, total, (batch, jax.random.split(key, rows)))
    return total, jnp.sum(learned)


@form
class Probe(Weight):
    """A kernel whose Gram matrices are the gradients of two leaves: of its inputs, and of the gradients by its outputs.

    `real` `[B, T]` is 1 for the tokens that count. The leaves `inputs` `[in, in]` and `outputs` `[out, out]` are not
    read: they change no product.
    """

    base: Any = frozen(axes=KERNEL)
    real: jax.Array = frozen()
    inputs: jax.Array = trainable()
    outputs: jax.Array = trainable()

    def materialize(self) -> jax.Array:
        """The base's kernel."""
        return materialize(self.base)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """The base's product, for `x` `[B, T, in]`."""
        return _record(dot_to_float32(x, self.base), x, self.real, self.inputs, self.outputs)


@jax.custom_vjp
def _record(y: jax.Array, x: jax.Array, real: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    del x, real, inputs, outputs
    return y


def _record_forward(y: jax.Array, x: jax.Array, real: jax.Array, *grams: jax.Array) -> tuple[jax.Array, Any]:
    del grams
    return y, (x, real)


def _record_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, real = saved
    return dy, jnp.zeros_like(x), jnp.zeros_like(real), _gram(x, real), _gram(dy, real)


def _gram(x: jax.Array, real: jax.Array) -> jax.Array:
    flat = jnp.where(real[..., None] > 0, at_least_float32(x), 0).reshape(-1, x.shape[-1])
    return jnp.matmul(flat.T, flat, precision="highest")


_record.defvjp(_record_forward, _record_backward)


def grams(
    loss: Loss, params: PyTree, batches: Iterable[Batch], *, draw: Draw | None = None, chosen: Chosen = bool
) -> HostArrays:
    """The Gram matrices of the kernels of layers that are `chosen`, by leaf name, in float32.

    `NAME` is the mean of `x^T x` over all real tokens, `[L, in, in]`, as RegMean and MaTS ask for (arXiv:2212.09849,
    arXiv:2312.04339), and `NAME.output_gram` that of the gradients of a batch's log-likelihood by the outputs,
    `[L, out, out]`, with labels as in `fisher`. `params` may hold forms. Raises UserError for batches without a token.
    """
    names = frozenset(n for n, x in tree.named_leaves(params, is_weight) if is_layer_kernel(n, x) and chosen(n))
    total: Any = None
    count, key = 0, jax.random.key(0)
    for i, batch in enumerate(batches):
        total = _add_grams(loss, draw, names, total, params, dict(batch), jax.random.fold_in(key, i))
        count += int(np.sum(np.asarray(batch["segments"]) > 0))
    if not count:
        raise UserError("the data of the statistics hold no token: name other data")
    found: HostArrays = {}
    for name, pair in total.items():
        for end, gram in zip(("", OUTPUT_GRAM), pair, strict=True):
            found[f"{name}{end}"] = np.asarray(gram) / np.float32(count)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _add_grams(
    loss: Loss, draw: Draw | None, names: frozenset[str], total: Any, params: PyTree, batch: Batch, key: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    shapes = {n: w.shape for n, w in tree.named_leaves(params, is_weight) if n in names}
    zeros = {n: (jnp.zeros((k, m, m)), jnp.zeros((k, o, o))) for n, (k, m, o) in shapes.items()}
    real = (batch["segments"] > 0).astype(jnp.float32)
    labelled = draw(params, batch, key) if draw else batch

    def probed_loss(leaves: Mapping[str, tuple[jax.Array, jax.Array]]) -> jax.Array:
        def probe(name: str, w: Any) -> Any:
            if name not in leaves:
                return w
            spread = jnp.broadcast_to(real, (w.shape[0], *real.shape))
            return Probe(base=w, real=spread, inputs=leaves[name][0], outputs=leaves[name][1])

        return loss(tree.map_named(probe, params, is_leaf=is_weight), labelled)[0]

    found = jax.grad(probed_loss)(zeros)
    return found if total is None else jax.tree.map(jnp.add, total, found)


@functools.cache
def draw_targets(network: Network) -> Draw:
    """What replaces the targets of language modeling by tokens that the model itself draws, each after its context."""

    def draw(params: PyTree, batch: Batch, key: jax.Array) -> Batch:
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        h_BxTxD = network.apply({"params": params}, *inputs, method="features")
        logits_BxTxV = network.apply({"params": params}, h_BxTxD, method="logits")
        return {**batch, "targets": jax.random.categorical(key, logits_BxTxV).astype(jnp.int32)}

    return draw


def by_tensor(tensors: Sequence[Tensor], found: Mapping[str, np.ndarray], *, square: bool) -> HostArrays:
    """Statistics by the names that Hugging Face gives the tensors; those of `square` matrices are not transposed."""
    stored: HostArrays = {}
    for tensor in tensors:
        for end in ("", OUTPUT_GRAM):
            if (leaf := found.get(f"{tensor.leaf}{end}")) is None:
                continue
            for place, name in zip(tensor.places, tensor.names, strict=True):
                part = leaf[place].T if tensor.transpose and not square else leaf[place]
                stored[f"{name}{end}"] = np.ascontiguousarray(part, np.float32)
    return stored


def write(path: Path, arrays: HostArrays) -> None:
    """Writes statistics as a safetensors file, beside its place and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch_beside(path) as scratch:
        save_file(arrays, scratch)
        files.sync_file(scratch)
        scratch.rename(path)
