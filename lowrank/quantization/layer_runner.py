"""A model run one layer at a time, which records the inputs of its kernels.

The input of the first layer comes from the forward pass of the model, without its layers. Each layer is then called
alone, and interceptors record the inputs of its Linear modules: the models themselves stay as they are.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.models.layer_stack import stack_depths
from lowrank.models.layers import Linear
from lowrank.models.layerwise import call_layer, first_inputs, run_layer
from lowrank.models.positions import layer_kinds

Moments = dict[str, tuple[jax.Array, jax.Array]]  # kernel -> (sum of x^T x [in, in], sum of |x| [in]), float32


class LayerRunner:
    """The layers of `params` in order, on `batches` of `(tokens int32 [B, T], segments int32 [B, T])`, 0 is padding.

    `names` are the kernels whose inputs are recorded. Raises UserError for a kernel that no layer multiplies by.
    """

    def __init__(self, config: Any, params: PyTree, names: Iterable[str], batches: Sequence[Any]) -> None:
        self._config, self._params = config, params
        self.order = [(stack, i) for stack, depth in stack_depths(config).items() for i in range(depth)]
        starts = [first_inputs(config, params, *batch) for batch in batches]
        self._streams, self._inputs = [h for h, _ in starts], [inputs for _, inputs in starts]
        self._real = [jnp.asarray(segments > 0) for _, segments in batches]
        self._names = set(names)
        for name in sorted(self._names - self._linear_kernels()):
            raise UserError(f"{name} is not the kernel of a Linear in a layer, so that it cannot be calibrated")

    def kernel_inputs(self, stack: str, i: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`{kernel: (x^T x [in, in], mean of |x| [in])}` of a layer, over all tokens that are not padding."""
        moments = [_moments_of_layer(*self._layer(stack, i), *batch) for batch in self._batches(stack, i)]
        count = sum(int(real.sum()) for real in self._real)
        wanted = {name for name in moments[0] if f"{stack}/{name}" in self._names}
        total = {name: jax.tree.map(lambda *x: sum(map(np.float64, x)), *(m[name] for m in moments)) for name in wanted}
        return {f"{stack}/{name}": (gram, size / count) for name, (gram, size) in sorted(total.items())}

    def advance(self, stack: str, i: int, kernels: Mapping[str, Any]) -> None:
        """Runs a layer on the outputs of the layers before, with `kernels` (by name, unstacked) in place of its own."""
        config, layer = self._layer(stack, i)
        replaced = {name.removeprefix(f"{stack}/"): kernel for name, kernel in kernels.items()}
        layer = tree.map_named(lambda name, leaf: replaced.get(name, leaf), layer, is_leaf=is_weight)
        self._streams = [run_layer(config, layer, h, inputs, kind) for h, inputs, kind, _ in self._batches(stack, i)]

    def _layer(self, stack: str, i: int) -> tuple[Any, PyTree]:
        return self._config, jax.tree.map(lambda x: x[i], self._params[stack])

    def _batches(self, stack: str, i: int) -> list[tuple[Any, ...]]:
        kind = jax.tree.map(lambda x: x[self.order.index((stack, i))], layer_kinds(self._config))
        return [(h, x, kind, real) for h, x, real in zip(self._streams, self._inputs, self._real, strict=True)]

    def _linear_kernels(self) -> set[str]:
        """The names of the kernels of all Linear modules in layers."""
        names = set()
        for stack in stack_depths(self._config):
            config, layer = self._layer(stack, 0)
            moments = functools.partial(_moments_of_layer, config)
            names |= {f"{stack}/{n}" for n in jax.eval_shape(moments, layer, *self._batches(stack, 0)[0])}
        return names


@functools.partial(jax.jit, static_argnums=0)
def _moments_of_layer(config: Any, layer: PyTree, h: jax.Array, inputs: Any, kind: Any, real_BxT: jax.Array) -> Moments:
    recorded: dict[str, jax.Array] = {}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            recorded["/".join((*context.module.path, "kernel"))] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        call_layer(config, layer, h, inputs, kind)
    return {name: _moments(x, real_BxT) for name, x in recorded.items() if x.shape[:2] == real_BxT.shape}


def _moments(x_BxTxD: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = jnp.where(real_BxT[..., None], x_BxTxD.astype(jnp.float32), 0).reshape(-1, x_BxTxD.shape[-1])
    return jnp.matmul(flat.T, flat, precision="highest"), jnp.sum(jnp.abs(flat), axis=0)
