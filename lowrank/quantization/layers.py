"""A model run one layer at a time, and what its kernels are multiplied by.

The model itself says what its first layer is given: its layers are cut out of its forward pass. Each of them is then
called alone, and what its Linear modules read is listened to. Models know nothing of it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank import models
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.models.layer_stack import stack_depths
from lowrank.models.layers import Linear

Seen = dict[str, tuple[jax.Array, jax.Array]]  # by kernel: (sum of x^T x [in, in], sum of |x| [in]), float32


class Layers:
    """The layers of `params` in order, on `batches` of `(tokens int32 [B, T], segments int32 [B, T])`, 0 is padding.

    `names` are the kernels whose inputs are of interest. Raises UserError for one that no layer multiplies by.
    """

    def __init__(self, config: Any, params: PyTree, names: Iterable[str], batches: Sequence[Any]) -> None:
        self._config, self._params = config, params
        self.order = [(stack, i) for stack, depth in stack_depths(config).items() for i in range(depth)]
        starts = [_start(config, params, *batch) for batch in batches]
        self._streams, self._views = [h for h, _ in starts], [view for _, view in starts]
        self._real = [jnp.asarray(segments > 0) for _, segments in batches]
        self._names = set(names)
        for name in sorted(self._names - self._found()):
            raise UserError(f"{name} is the kernel of no Linear in a layer, and has no inputs to calibrate by")

    def inputs(self, stack: str, i: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By kernel of a layer: `(x^T x [in, in], mean of |x| [in])` over all tokens that are not padding."""
        seen = [_observed(*self._layer(stack, i), *rest) for rest in self._rest(stack, i)]
        count = sum(int(real.sum()) for real in self._real)
        wanted = {name for name in seen[0] if f"{stack}/{name}" in self._names}
        total = {name: jax.tree.map(lambda *x: sum(map(np.float64, x)), *(s[name] for s in seen)) for name in wanted}
        return {f"{stack}/{name}": (gram, size / count) for name, (gram, size) in sorted(total.items())}

    def advance(self, stack: str, i: int, kernels: Mapping[str, Any]) -> None:
        """Runs a layer, with `kernels` (unstacked, by name) in place of its own, on what the layers before returned."""
        config, layer = self._layer(stack, i)
        mine = {name.removeprefix(f"{stack}/"): kernel for name, kernel in kernels.items()}
        layer = tree.map_named(lambda name, leaf: mine.get(name, leaf), layer, is_leaf=is_weight)
        self._streams = [_run(config, layer, h, view, kind) for h, view, kind, _ in self._rest(stack, i)]

    def _layer(self, stack: str, i: int) -> tuple[Any, PyTree]:
        return self._config, jax.tree.map(lambda x: x[i], self._params[stack])

    def _rest(self, stack: str, i: int) -> list[tuple[Any, ...]]:
        local = getattr(self._config, "mixed", False)
        kind = jnp.int32(self._config.local_layers[self.order.index((stack, i))]) if local else None
        return [(h, view, kind, real) for h, view, real in zip(self._streams, self._views, self._real, strict=True)]

    def _found(self) -> set[str]:
        """The kernels that layers multiply by in a Linear."""
        found = set()
        for stack in stack_depths(self._config):
            seen = functools.partial(_observed, self._config)
            found |= {f"{stack}/{n}" for n in jax.eval_shape(seen, self._layer(stack, 0)[1], *self._rest(stack, 0)[0])}
        return found


@functools.partial(jax.jit, static_argnums=0)
def _start(config: Any, params: PyTree, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, Any]:
    """`(the first layer's stream [B, T, D], what layers see)`."""
    given: list[Any] = []

    def cut(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "_run_stacks":
            return call(*args, **kwargs)
        given.extend(args[:2])
        return (args[0], {}) if isinstance(config, models.DecoderConfig) else args[0]

    with nn.intercept_methods(cut):
        models.build_model(config).apply({"params": params}, tokens, segments=segments, method="features")
    return tuple(given)


def _called(config: Any, layer: PyTree, h: jax.Array, view: Any, kind: Any) -> jax.Array:
    return models.build_block(config).apply({"params": layer}, h, view, kind, None, None)[0]


_run = jax.jit(_called, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _observed(config: Any, layer: PyTree, h: jax.Array, view: Any, kind: Any, real_BxT: jax.Array) -> Seen:
    inputs: dict[str, jax.Array] = {}

    def listen(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            inputs["/".join((*context.module.path, "kernel"))] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        _called(config, layer, h, view, kind)
    return {name: _moments(x, real_BxT) for name, x in inputs.items() if x.shape[:2] == real_BxT.shape}


def _moments(x_BxTxD: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = jnp.where(real_BxT[..., None], x_BxTxD.astype(jnp.float32), 0).reshape(-1, x_BxTxD.shape[-1])
    return jnp.matmul(flat.T, flat, precision="highest"), jnp.sum(jnp.abs(flat), axis=0)
