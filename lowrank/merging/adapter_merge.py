"""Adapters of one base merged into one LoRA: exactly in factor space where the rule is linear, else truncated.

A linear rule adds updates, whatever their ranks, alphas and targets; a module that an adapter does not target has the
update zero. Other rules act on the dense updates, one kernel at a time. On updates, `linear` and the soups are sums of
updates.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.adapters.peft import config as peft_config
from lowrank.adapters.peft import tensors as peft_tensors
from lowrank.adapters.peft.forms.lora import LORA
from lowrank.adapters.peft.modules import base_modules
from lowrank.core import files
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import PathLike, as_local_path
from lowrank.merging import parameters
from lowrank.merging.adapter_source import AdapterSource, same_weights, tensor_name
from lowrank.merging.checkpoint import Checkpoint, read_tensor
from lowrank.merging.combine import RECIPE
from lowrank.merging.factors import Factors, concatenate, recompress, truncate
from lowrank.merging.output import check_new
from lowrank.merging.plan import find_statistics
from lowrank.merging.recipe import Recipe, Source
from lowrank.merging.rule import Group, count

REPORT = "merge_report.json"
Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """A checked merge of adapters; `rank` of None keeps the sum of the ranks."""

    recipe: Recipe
    base: Checkpoint
    adapters: tuple[AdapterSource, ...]
    sources: tuple[Source, ...]
    rank: int | None

    @property
    def paths(self) -> list[str]:
        """The modules that any of the adapters targets."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.paths))

    def values(self, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """`(options of all, options of each adapter)` for a module."""
        recipe, name = self.recipe, tensor_name(path, self.base)
        layer, _ = self.base.split_name(name)
        u = 0.0 if layer is None else layer / (self.base.depth - 1) if self.base.depth > 1 else 1.0
        scopes = recipe.parameters
        shared = parameters.resolve(recipe.rule, recipe.preset, scopes, name, u, per_model=False)
        own = [
            parameters.resolve(recipe.rule, recipe.preset, (s.parameters, *scopes), name, u, per_model=True)
            for s in self.sources
        ]
        if recipe.rule.check:
            recipe.rule.check(shared, own)
        return shared, own


def plan_adapters(recipe: Recipe) -> AdapterPlan:
    """The merge of adapters that a recipe describes.

    Raises UserError for models that are not `BASE+ADAPTER`, for different bases, and for a rule that needs a rank.
    """
    group = dict(recipe.adapter or {})
    if group.keys() - {"rank"}:
        raise unknown("key of adapter", min(group.keys() - {"rank"}), ["rank"])
    rank = count("adapter.rank", group["rank"]) if group.get("rank") is not None else None
    if recipe.align:
        raise UserError("align moves the tensors of whole models: leave it out, or leave out adapter")
    if len(recipe.slices) != 1 or recipe.slices[0].sources[0].layers or recipe.mixture:
        raise UserError("adapters are merged as a whole: list them in models, not in slices or experts")
    rule, sources = recipe.rule, tuple(s for s in recipe.slices[0].sources if s.model != recipe.base)
    for source in sources:
        if not source.model.adapter:
            raise UserError(f"{source.model} is not of the form BASE+ADAPTER, of which adapter: needs all models to be")
        parameters.check_names({recipe.method: rule}, source.parameters, per_model=True)
    rule.check_count(recipe.method, len(sources))
    if rule.select or (rule.statistics and not rule.merge_factors) or (rule.survey and rule.surveys(_whole(recipe))):
        raise UserError(
            f"{recipe.method} with these options reads whole models: leave out adapter, and merge into the base"
        )
    for scope in recipe.parameters:
        parameters.check_names({recipe.method: rule}, scope, per_model=False)
    bases = {s.model._replace(adapter=None): None for s in sources} | ({recipe.base: None} if recipe.base else {})
    base, *others = [Checkpoint(spec) for spec in bases]
    for other in others:
        if not same_weights(base, other):
            raise UserError(
                f"the bases {base.spec} and {other.spec} have different weights: adapters of one base merge"
            )
    adapters = tuple(AdapterSource(str(s.model.adapter), base) for s in sources)
    plan = AdapterPlan(recipe, base, adapters, sources, rank)
    names = [tensor_name(path, base) for path in plan.paths]
    parameters.check_filters([*recipe.parameters, *(s.parameters for s in sources)], names)
    for path in plan.paths:
        plan.values(path)
    linear = rule.task_coefficients or rule.merge_factors
    if rule.merge_factors and any(adapter.needs_kernel for adapter in adapters):
        raise UserError(f"{recipe.method} merges the factors of LoRA adapters: leave out adapter for the others")
    if rank is None and not (linear and all(adapter.has_factors for adapter in adapters)):
        raise UserError(
            f"{recipe.method} of these adapters has full rank: give adapter: {{rank: R}}, or merge into the base"
        )
    return plan


def check_output(plan: AdapterPlan, folder: Path) -> None:
    """Raises UserError for an output that exists, and for a disk without room for the merged factors in float32."""
    check_new(folder)
    total = 0
    for path in plan.paths:
        adapters = [adapter for adapter in plan.adapters if path in adapter.modules]
        size = adapters[0].kernel_shape(path)
        rank = plan.rank or min(size)
        if not (plan.rank or any(adapter.needs_kernel for adapter in adapters)):
            rank = sum(factors.rank for adapter in adapters if (factors := adapter.factors(path)))
        total += 4 * sum(size) * rank
    files.require_space(folder, total)


def _whole(recipe: Recipe) -> dict[str, Any]:
    return parameters.resolve(recipe.rule, recipe.preset, recipe.parameters, "", 0.0, per_model=False)


def merge_module(plan: AdapterPlan, path: str) -> tuple[Factors, float]:
    """`(merged update of a module, relative error of its rank)`."""
    rule, name = plan.recipe.rule, tensor_name(path, plan.base)
    shared, own = plan.values(path)
    present = {i: a for i, a in enumerate(plan.adapters) if path in a.modules}
    adapters = list(present.values())
    flipped = adapters[0].is_flipped(path)
    if rule.task_coefficients and not any(adapter.needs_kernel for adapter in adapters):
        coefficients = rule.task_coefficients(shared, own)
        found = [(coefficients[i], adapter.factors(path)) for i, adapter in present.items()]
        total = concatenate([(c, f) for c, f in found if f])
        return recompress(total, plan.rank) if plan.rank and plan.rank < total.rank else (total, 0.0)
    if rule.merge_factors:
        grams = [_gram(plan, source, path) for source in plan.sources]
        factors = [present[i].factors(path) if i in present else None for i in range(len(plan.adapters))]
        total = rule.merge_factors(shared, grams, factors)
        return recompress(total, plan.rank) if plan.rank and plan.rank < total.rank else (total, 0.0)
    stored = plan.base.read(name)
    kernel = stored.T if flipped else stored
    if rule.task_coefficients:
        coefficients = rule.task_coefficients(shared, own)
        delta = sum(coefficients[i] * a.delta(path, kernel) for i, a in present.items())
    else:
        base = stored.astype(np.float64)
        deltas = [plan.adapters[i].delta(path, kernel) if i in present else 0.0 * kernel for i in range(len(own))]
        tensors = [base + (d.T if flipped else d) for d in deltas]
        group = Group(name, base.copy(), tensors, shared, own, plan.recipe.seed)
        merged = rule.merge(group) - base
        delta = merged.T if flipped else merged
    assert plan.rank is not None
    return truncate(np.asarray(delta), min(plan.rank, *kernel.shape))


def _gram(plan: AdapterPlan, source: Source, path: str) -> np.ndarray:
    """The Gram matrix of a module's inputs in the statistics of an adapter."""
    name = tensor_name(path, plan.base)
    found = find_statistics(plan.recipe.method, source, name, plan.base.tensors[name].shape)
    if "gram" not in found:
        raise UserError(f"{source.statistics} lacks the Gram matrix of {name}, which an adapter targets")
    return read_tensor(f"the Gram matrix of {name}", found["gram"], np.float64)


def combine_adapters(recipe: Recipe, output: PathLike, *, progress: Progress = iter) -> dict[str, Any]:
    """Writes the merged adapter to a folder, as a plain LoRA with alpha = r, and returns its report."""
    folder, plan = as_local_path(output), plan_adapters(recipe)
    check_output(plan, folder)
    arrays: dict[str, np.ndarray] = {}
    settings, errors = dict[str, Any](), dict[str, float]()
    known = base_modules(plan.adapters[0].base)
    for path in progress(plan.paths):
        merged, errors[path] = merge_module(plan, path)
        arrays |= {known[path].key(part): getattr(merged, part.field).T for part in LORA.parts}
        settings[path] = {"r": merged.rank, "scale": 1.0, "dropout": 0.0}
    flat = not all(m.weight.transpose for path in settings if (m := known[path]).weight and m.linear)
    summary: Mapping[str, Any] = {
        **peft_config.common_keys("LORA", plan.adapters[0].base),
        "fan_in_fan_out": flat,
        "use_dora": False,
        **LORA.summary(settings, [path for path in known if path not in settings], {}),
        "bias": "none",
    }
    report = {
        "relative_error": errors,
        "worst": max(errors.values()),
        "ranks": {p: s["r"] for p, s in settings.items()},
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.scratch_beside(folder, folder=True) as scratch:
            peft_tensors.write_tensors(scratch, arrays)
            files.write_json(scratch / REPORT, report)
            files.write_text(scratch / RECIPE, recipe.text)
            files.write_json(scratch / peft_config.NAME, dict(sorted(summary.items())))
            files.sync_folder(scratch)
            scratch.rename(folder)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}") from None
    return report
