"""Experts from several fine-tunes (Sukhbaatar et al. 2024, arXiv:2403.07816): their MLPs side by side in one mixture.

The other tensors are merged by the recipe's rule, the mean unless it names one. Every layer gets a router, by which a
token's gates sum to 1: a mixture of equal experts computes what the dense model does.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.expert_layout import KERNELS, LAYOUTS, Layout, layout_of, mixture_config
from lowrank.merging.expert_recipe import Expert, Mixture
from lowrank.merging.plan import Checkpoints, Input, PlannedTensor
from lowrank.merging.recipe import Recipe
from lowrank.merging.routers import PROMPTED, Routers, encode

MLP = re.compile(rf"mlp\.({'|'.join(KERNELS)})\.weight")
Shapes = Mapping[Input, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Plan:
    mixture: Mixture
    layout: Layout
    base: Checkpoint
    checkpoints: Checkpoints
    shapes: Shapes
    routers: Routers


def plan_mixture(
    recipe: Recipe, checkpoints: Checkpoints, tensors: Sequence[PlannedTensor], shapes: Shapes, dtype: str
) -> tuple[list[PlannedTensor], dict[str, Any]]:
    """`(tensors, config.json)` of the mixture, from the `tensors` of a merge of its models.

    Raises UserError for a family without a mixture, an expert that does not fit, and a prompt that cannot be read.
    """
    mixture = recipe.mixture
    assert mixture is not None
    assert recipe.base is not None
    base = checkpoints[recipe.base]
    where, shared = str(base.spec), mixture.shared is not None
    name = layout_of(where, base.hf_config, mixture.layout, shared)
    count = len(mixture.experts)
    config = mixture_config(where, base.hf_config, name, count, mixture.per_token, shared, dtype)
    routers = _routers(recipe, mixture, base, config["hidden_size"])
    plan = _Plan(mixture, LAYOUTS[name], base, checkpoints, shapes, routers)
    return list(_expand(plan, tensors)), config


def _routers(recipe: Recipe, mixture: Mixture, base: Checkpoint, width: int) -> Routers:
    experts = [*mixture.experts, *([mixture.shared] if mixture.shared else [])]
    prompts = mixture.gate_mode in PROMPTED
    positive = [encode(base, e.positive) for e in experts] if prompts else []
    negative = [encode(base, e.negative) if e.negative else [] for e in experts] if prompts else []
    return Routers(mixture.gate_mode, base, width, len(experts), recipe.seed, positive, negative)


def _expand(plan: _Plan, tensors: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    """The tensors, with those of MLPs replaced by those of experts, and routers after a layer's last kernel."""
    for tensor in tensors:
        layer, rest = plan.base.split_name(tensor.name)
        match = MLP.fullmatch(rest) if layer is not None else None
        if layer is None or not match:
            yield tensor
            continue
        kernel, experts = match[1], plan.mixture.experts
        for e, expert in enumerate(experts):
            yield _expert_tensor(plan, layer, kernel, expert, plan.layout.experts[kernel].format(e=e))
        if plan.layout.shared:
            yield _shared_tensor(plan, layer, kernel)
        if kernel == KERNELS[-1]:
            yield _router(plan, layer, plan.layout.router, 0, len(experts))
            if plan.layout.shared:
                yield _router(plan, layer, plan.layout.shared_gate, len(experts), len(experts) + 1)


def _expert_tensor(plan: _Plan, layer: int, kernel: str, expert: Expert, rest: str) -> PlannedTensor:
    checkpoint = plan.checkpoints[expert.model]
    of_base = Input(plan.base.spec, plan.base.layer_name(layer, f"mlp.{kernel}.weight"))
    source = Input(expert.model, checkpoint.layer_name(layer, f"mlp.{kernel}.weight"))
    shape, found = plan.shapes[of_base], plan.shapes.get(source)
    if found != shape:
        size = f"has {source.name} of shape {list(found)}" if found else f"lacks the tensor {source.name!r}"
        raise UserError(f"the expert {expert.model} {size}, and the base one of {list(shape)}: experts are of one size")
    scale = expert.scale if kernel == "down_proj" else 1.0
    name = plan.base.layer_name(layer, rest)
    return PlannedTensor(name, shape, (source,), None, {}, ({"scale": scale},), method="passthrough")


def _shared_tensor(plan: _Plan, layer: int, kernel: str) -> PlannedTensor:
    """A kernel of the shared expert; without one, of an expert of width 1 that adds zero, as the layout has to have."""
    rest = plan.layout.shared.replace("KERNEL", kernel)
    if plan.mixture.shared:
        return _expert_tensor(plan, layer, kernel, plan.mixture.shared, rest)
    width = plan.routers.width
    return _made(plan.base.layer_name(layer, rest), (width, 1) if kernel == "down_proj" else (1, width), np.zeros)


def _router(plan: _Plan, layer: int, rest: str, first: int, stop: int) -> PlannedTensor:
    name, shape = plan.base.layer_name(layer, rest), (stop - first, plan.routers.width)
    if stop > plan.routers.count:
        return _made(name, shape, np.zeros)
    return _made(name, shape, lambda shape: plan.routers.rows(layer, first, stop))


def _made(name: str, shape: tuple[int, ...], make: Any) -> PlannedTensor:
    return PlannedTensor(name, shape, (), None, {}, (), make=make)
