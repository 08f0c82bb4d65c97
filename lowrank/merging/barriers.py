"""The barriers between the models of a recipe with `align`, before and after: merges along a line, and their scores."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank.merging.alignment.barrier import Line
from lowrank.merging.alignment.layers import Model
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.model_spec import ModelSpec
from lowrank.merging.recipe import Recipe, Slice, Source

PLACES = (0.25, 0.5, 0.75)  # between the ends


def measure_barriers(recipe: Recipe, score: Callable[[Recipe], float]) -> dict[str, dict[str, Any]]:
    """`{model: {"places", "before", "after", "barrier_before", "barrier_after"}}` on the line from the first model.

    `score` merges a recipe and gives its score, higher is better. A model that only a transport fits to the width of
    the first one's MLPs has no line before.
    """
    reference = recipe.base or recipe.slices[0].sources[0].model
    others = [model for model in recipe.models if model != reference]
    first, found = score(_mean(recipe, (reference, 1.0))), {}
    for model in others:
        last = score(_mean(recipe, (model, 1.0)))

        def line(aligned: bool, model: ModelSpec = model, last: float = last) -> Line:
            middle = [score(_mean(recipe, (reference, 1 - t), (model, t), aligned=aligned)) for t in PLACES]
            return Line((0.0, *PLACES, 1.0), (first, *middle, last))

        lines = {"after": line(True)} | ({"before": line(False)} if _units(model) == _units(reference) else {})
        found[str(model)] = (
            {"places": lines["after"].places}
            | {name: each.scores for name, each in lines.items()}
            | {f"barrier_{name}": each.barrier for name, each in lines.items()}
        )
    return found


def _units(model: ModelSpec) -> int:
    return Model(Checkpoint(model)).units


def _mean(recipe: Recipe, *models: tuple[ModelSpec, float], aligned: bool = False) -> Recipe:
    """The weighted mean of models, in the order of the first one if `aligned`."""
    sources = tuple(Source(model, None, {"weight": weight}, None) for model, weight in models)
    part = Slice(sources, None, {}, "linear")
    align = recipe.align if aligned else None
    plain = dataclasses.replace(recipe, method="linear", base=None, slices=(part,), parameters=(), mixture=None)
    return dataclasses.replace(plain, align=align, score=None, out_dtype="float32")
