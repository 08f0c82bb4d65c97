"""The plan of a merge: every tensor of the result, what it is made of and with which options, before one is read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank.core.errors import UserError, nearest, plural
from lowrank.core.paths import as_local_path
from lowrank.merging import parameters, structure
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.model_spec import ModelSpec
from lowrank.merging.recipe import Recipe, Slice, Source
from lowrank.merging.rule import Rule, Values
from lowrank.merging.rules import RULES
from lowrank.pretrained import hf_files
from lowrank.pretrained.tensor_reader import StoredTensor

Checkpoints = Mapping[ModelSpec, Checkpoint]


class Input(NamedTuple):
    """A tensor of a model."""

    model: ModelSpec
    name: str


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result, merged by the rule `method` or, without inputs, made by `make(shape)`.

    `statistics` are those of each input, by what a rule calls them.
    """

    name: str
    shape: tuple[int, ...]
    inputs: tuple[Input, ...]
    base: Input | None
    shared: Values
    own: tuple[Values, ...]
    statistics: tuple[Mapping[str, StoredTensor], ...] = ()
    method: str = ""
    make: Callable[[tuple[int, ...]], np.ndarray] | None = None

    @property
    def parents(self) -> tuple[Input, ...]:
        """All that it is made of, the base first."""
        return ((self.base,) if self.base else ()) + self.inputs


class Roles(NamedTuple):
    """The sources of a slice that are merged, and its base."""

    sources: tuple[Source, ...]
    base: Source | None

    @property
    def everyone(self) -> tuple[Source, ...]:
        """All of them, the base first."""
        return ((self.base,) if self.base else ()) + self.sources


def assign_roles(recipe: Recipe, part: Slice) -> Roles:
    """Which source of a slice is the base. Raises UserError where the rule needs one and none is there, or too many."""
    rule, method, base = part.rule, part.method, part.base
    ranged = part.sources[0].layers is not None
    listed = next((s for s in part.sources if s.model == base), None)
    others = tuple(s for s in part.sources if s is not listed)
    if (rule.base or rule.may_have_base or rule.base_first) and base and not listed:
        if ranged:
            raise UserError(f"the base {base} is not among the sources of a slice, which needs its layer_range")
        listed = Source(base, None, {}, None)
    if rule.base or (rule.may_have_base and base):
        if not listed:
            raise UserError(f"{method} acts on task vectors, the differences from a base: give base_model")
        roles = Roles(others, listed)
    elif rule.base_first and listed:
        roles = Roles((listed, *others), None)
    else:
        if base and not listed and not ranged and not recipe.mixture:
            raise UserError(f"{method} has no base: list {base} among the models, or leave out base_model")
        roles = Roles(part.sources, None)
    rule.check_count(method, len(roles.sources))
    return roles


def plan_tensors(
    recipe: Recipe, checkpoints: Checkpoints, shapes: Mapping[Input, tuple[int, ...]]
) -> list[PlannedTensor]:
    """Every tensor of the result, in the order in which they are written.

    `shapes` are those of the inputs. Raises UserError for a tensor that one model lacks or has in another shape, and
    for a parameter that is unknown, unmatched, missing or wrong for one of the tensors.
    """
    roles = [assign_roles(recipe, part) for part in recipe.slices]
    rules = {part.method: part.rule for part in recipe.slices}
    for scope in recipe.parameters:
        parameters.check_names(rules, scope, per_model=False)
    for part in recipe.slices:
        parameters.check_names({part.method: part.rule}, part.parameters, per_model=False)
        for source in part.sources:
            parameters.check_names({part.method: part.rule}, source.parameters, per_model=True)
    planned = [
        _plan_tensor(recipe, part, role, name, inputs, u, shapes)
        for part, role, name, inputs, u in _outputs(recipe, roles, checkpoints)
    ]
    names = {tensor.name for tensor in planned} | {i.name for tensor in planned for i in tensor.parents}
    scopes = [
        *recipe.parameters,
        *(p for part in recipe.slices for p in (part.parameters, *(s.parameters for s in part.sources))),
    ]
    parameters.check_filters(scopes, names)
    for method, rule in rules.items():
        _check_whole(rule, [tensor for tensor in planned if tensor.method == method])
    return planned


Output = tuple[Slice, Roles, str, tuple[Input, ...], float]


def _outputs(recipe: Recipe, roles: Sequence[Roles], checkpoints: Checkpoints) -> Iterator[Output]:
    """`(slice, roles, name in the result, inputs, place along the slice's layers)`; the base's input is the first."""
    first = checkpoints[roles[0].everyone[0].model]
    yield from _outer(recipe.slices[0], roles[0], checkpoints, lambda name: not structure.is_last(name))
    depth = 0
    for part, role in zip(recipe.slices, roles, strict=True):
        spans = [_span(source, checkpoints[source.model]) for source in role.everyone]
        if len({stop - start for start, stop in spans}) > 1:
            raise UserError(f"the models differ in their number of layers: {_listed(role, [b - a for a, b in spans])}")
        length = spans[0][1] - spans[0][0]
        for offset in range(length):
            layers = [start + offset for start, _ in spans]
            for rest in _common_names(role, checkpoints, layers):
                inputs = tuple(
                    Input(s.model, checkpoints[s.model].layer_name(i, rest))
                    for s, i in zip(role.everyone, layers, strict=True)
                )
                yield part, role, first.layer_name(depth, rest), inputs, offset / (length - 1) if length > 1 else 1.0
            depth += 1
    yield from _outer(recipe.slices[-1], roles[-1], checkpoints, structure.is_last)


def _outer(part: Slice, role: Roles, checkpoints: Checkpoints, chosen: Any) -> Iterator[Output]:
    for name in _common_names(role, checkpoints, [None] * len(role.everyone)):
        if chosen(name):
            yield part, role, name, tuple(Input(source.model, name) for source in role.everyone), 0.0


def _span(source: Source, checkpoint: Checkpoint) -> tuple[int, int]:
    start, stop = source.layers or (0, checkpoint.depth)
    if stop > checkpoint.depth:
        raise UserError(
            f"layer_range={[start, stop]} of {source.model} ends beyond its {plural(checkpoint.depth, 'layer')}"
        )
    return start, stop


def _listed(role: Roles, values: Sequence[Any]) -> str:
    return ", ".join(f"{source.model} has {value}" for source, value in zip(role.everyone, values, strict=True))


def _common_names(role: Roles, checkpoints: Checkpoints, layers: Sequence[int | None]) -> list[str]:
    """The names, without their layer, of the tensors of the sources' layers. Raises UserError where they differ."""
    present = []
    for source, layer in zip(role.everyone, layers, strict=True):
        checkpoint = checkpoints[source.model]
        split = (checkpoint.split_name(name) for name in checkpoint.tensors)
        present.append([rest for at, rest in split if at == layer])
    for source, names in zip(role.everyone[1:], present[1:], strict=True):
        if different := sorted(set(names) ^ set(present[0])):
            lacking, other = (source.model, role.everyone[0].model)
            if different[0] in names:
                lacking, other = other, lacking
            where = f" in layer {layers[0]}" if layers[0] is not None else ""
            raise UserError(
                f"{lacking} lacks the tensor {different[0]!r}{where}, which {other} has: their architectures differ"
            )
    return present[0]


def _plan_tensor(
    recipe: Recipe,
    part: Slice,
    role: Roles,
    name: str,
    inputs: tuple[Input, ...],
    u: float,
    shapes: Mapping[Input, Any],
) -> PlannedTensor:
    shape = shapes[inputs[0]]
    for other in inputs[1:]:
        if shapes[other] != shape:
            raise UserError(_shape_text(inputs[0], shape, other, shapes[other]))
    scopes = (part.parameters, *recipe.parameters)
    resolve, preset = parameters.resolve, recipe.preset
    rule = part.rule
    shared = resolve(rule, preset, scopes, name, u, per_model=False)
    merged = inputs[1:] if role.base else inputs
    own = tuple(
        resolve(rule, preset, (source.parameters, *scopes), tensor.name, u, per_model=True)
        for source, tensor in zip(role.sources, merged, strict=True)
    )
    if rule.check:
        try:
            rule.check(shared, own)
        except UserError as e:
            raise UserError(f"{e} (for {name})") from None
    found = tuple(
        find_statistics(part.method, source, tensor.name, shape)
        for source, tensor in zip(role.sources, merged, strict=True)
    )
    requested = any(isinstance(source.statistics, dict) for source in role.sources)
    if len({tuple(statistics) for statistics in found}) > 1 and not requested:
        lacking = min(zip(found, role.sources, strict=True), key=lambda pair: len(pair[0]))[1]
        raise UserError(f"{lacking.statistics} lacks statistics of {name} that those of other models have")
    return PlannedTensor(name, shape, merged, inputs[0] if role.base else None, shared, own, found, part.method)


def _shape_text(first: Input, shape: Any, other: Input, other_shape: Any) -> str:
    vocabulary = structure.VOCABULARY.fullmatch(first.name) and shape[1:] == other_shape[1:]
    remedy = ": set tokenizer_source to base, union or a model" if vocabulary else ""
    what = "their vocabularies differ" if vocabulary else "their shapes differ"
    sizes = f"{first.model} has {first.name} of shape {list(shape)} and {other.model} of {list(other_shape)}"
    return f"{sizes}, so {what}{remedy}"


def find_statistics(method: str, source: Source, name: str, shape: tuple[int, ...]) -> Mapping[str, StoredTensor]:
    """The statistics of a model's tensor, by what a rule calls them; none where they are still to be computed.

    Raises UserError for a model without statistics, and for those of another shape.
    """
    kind = RULES[method].statistics
    if not kind:
        return {}
    if not source.statistics:
        needed = f"{method} needs the statistics of {source.model}"
        raise UserError(f"{needed}: give statistics: FILE.safetensors with it, or {{data: SOURCE, rows: N}}")
    if isinstance(source.statistics, dict):
        return {}  # they are computed before the merge
    stored = _open_statistics(source.statistics)
    if kind == "fisher" and name not in stored:
        raise UserError(f"{source.statistics} lacks {name!r}{nearest(name, stored)}")
    names = {kind: name, "output_gram": f"{name}.output_gram"}
    found = {key: stored[name] for key, name in names.items() if name in stored}
    square: list[tuple[int, ...]] = [(n, n) for n in shape]
    fits = {"fisher": [shape], "gram": square, "output_gram": square}
    for key, statistic in found.items():
        if statistic.shape not in fits[key]:
            size = f"{names[key]} has shape {list(statistic.shape)}"
            raise UserError(f"{source.statistics}: {size}, which does not fit a tensor of shape {list(shape)}")
    return found


@functools.lru_cache(maxsize=64)
def _open_statistics(path: str) -> Mapping[str, StoredTensor]:
    return hf_files.open_file(as_local_path(path))


def _check_whole(rule: Rule, planned: Sequence[PlannedTensor]) -> None:
    """Raises UserError for an option of the whole model that differs from one tensor to another."""
    whole = [name for name, option in rule.options.items() if option.whole]
    if rule.surveys(planned[0].shared):
        whole += [name for name, option in rule.options.items() if option.per_model and name == "density"]
    for tensor in planned:
        for name in whole:
            values = [{name: t.shared.get(name)} | {"own": [o.get(name) for o in t.own]} for t in (planned[0], tensor)]
            if values[0] != values[1]:
                raise UserError(f"{name} is read before the first tensor is merged: it cannot differ for {tensor.name}")


def total_bytes(planned: Sequence[PlannedTensor], itemsize: int) -> int:
    """The bytes of all tensors of the result."""
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in planned) * itemsize
