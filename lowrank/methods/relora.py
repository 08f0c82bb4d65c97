"""ReLoRA as a method: LoRA that is merged and restarted, so that its updates add up to a higher rank."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank.core import config_schema, tree, weight
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.lora import lora
from lowrank.methods.method import EveryNSteps, Method
from lowrank.methods.options import with_options_of
from lowrank.weights import lora as form
from lowrank.weights.lora import LoRA


@with_options_of(lora)
def relora(every: float = 0.25, warmup: float = 0.1, **kwargs: Any) -> Method:
    """ReLoRA: LoRA that is merged into the base and restarted every `every` steps (Lialin et al., arXiv:2307.05695).

    Takes the options of `lora`. A restart sets `W <- W + scale A B`, draws A and B as at the start, resets the moments
    of the optimizer, and lets the learning rate rise from 0 to its schedule over `warmup` steps. Values of `every`
    below 1 are a share of the run, and values of `warmup` below 1 are a share of `every`. The base changes, so it must
    be a plain kernel, and an adapter saves it.
    """
    targets.check_positive(every=every, warmup=warmup)
    method = config_schema.call_with_group(lora, kwargs, "method")
    [(target, adapt)] = method.rules

    def on_kernel(key: jax.Array, w: Any, name: str) -> LoRA:
        form.require_plain_kernel("ReLoRA", w)
        return adapt(key, w, name)

    def again(params: PyTree, key: jax.Array) -> PyTree:
        def anew(name: str, w: Any) -> Any:
            if not isinstance(w, LoRA):
                return w
            made = adapt(weight.name_key(key, name), w.materialize(), name)
            return dataclasses.replace(made, scale=w.scale)  # the same array, so that checkpoints do not save it

        return tree.map_named(anew, params, is_leaf=weight.is_weight)

    restarts = EveryNSteps(every, again)

    def optimizer(plain: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        between = restarts.interval(steps)
        rise = max(1, targets.count_steps(warmup, between))
        if between >= steps:
            run = f"the run's {plural(steps, 'step')}"
            raise UserError(f"method.every {every} is not less than {run}: it would never restart")
        if rise > between:
            raise UserError(f"method.warmup {warmup} is longer than method.every {every}: lower it")
        return restart_optimizer(plain, between, rise)

    hooks = dataclasses.replace(method.hooks, every_n_steps=restarts, optimizer=optimizer)
    return dataclasses.replace(method, rules=((target, on_kernel),), hooks=hooks)


class RestartingState(NamedTuple):
    """The state of the optimizer, and the number of updates done."""

    inner: Any
    count: jax.Array  # type: ignore[assignment]  # the updates done; the name hides tuple.count


def restart_optimizer(
    plain: optax.GradientTransformation, every: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """`plain`, whose state is reset before updates `every`, `2 every`, ... (from 0).

    After each reset, the updates rise from `1 / warmup` of their size to their full size within `warmup` updates.
    """

    def init(trained: PyTree) -> RestartingState:
        return RestartingState(plain.init(trained), jnp.int32(0))

    def update(
        gradient: PyTree, state: RestartingState, trained: PyTree, **extra: Any
    ) -> tuple[PyTree, RestartingState]:
        count = state.count
        due = (count > 0) & (count % every == 0)
        inner = optax.tree.where(due, plain.init(trained), state.inner)
        updates, inner = plain.update(gradient, inner, trained, **extra)
        rise = jnp.minimum(1.0, (count % every + 1) / warmup)
        size = jnp.where(count < every, 1.0, rise)
        return jax.tree.map(lambda u: u * size, updates), RestartingState(inner, count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
