"""A merge from its recipe to a folder: planned and checked, streamed a tensor at a time, reported.

At most (N + 3) arrays of the largest tensor's size in float32 are held at once, for N models and a base. The rules
that need statistics hold these too.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core import files, schema
from lowrank.core.errors import UserError, plural
from lowrank.core.paths import PathLike, as_local_path
from lowrank.merging import card, report, structure, vocabulary
from lowrank.merging.adapter_source import add_adapter
from lowrank.merging.alignment.align import align_all, check_all
from lowrank.merging.barriers import measure_barriers
from lowrank.merging.checkpoint import Checkpoint, read_tensor
from lowrank.merging.experts import plan_mixture
from lowrank.merging.output import Output, digest_of
from lowrank.merging.plan import Checkpoints, Input, PlannedTensor, assign_roles, plan_tensors
from lowrank.merging.recipe import Recipe
from lowrank.merging.rule import Group
from lowrank.merging.rules import RULES
from lowrank.pretrained.companions import GENERATION, VOCABULARIES

SHARD_BYTES = 5_000_000_000
RECIPE = "merge_recipe.yaml"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
Progress = Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]
Score = Callable[[Path], float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked merge. `vocabulary` is the new one, None where the models' own is kept."""

    recipe: Recipe
    checkpoints: Checkpoints
    tensors: list[PlannedTensor]
    hf_config: dict[str, Any]
    dtype: str
    vocabulary: vocabulary.Vocabulary | None

    @property
    def first(self) -> Checkpoint:
        """The model whose config and tokenizer the result has: the base, or the first one."""
        recipe = self.recipe
        return self.checkpoints[recipe.base or recipe.slices[0].sources[0].model]

    def output(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> Output:
        """The folder that it is written to."""
        return Output(folder, self.tensors, self.dtype, shard_bytes)

    def __str__(self) -> str:
        """Two lines for people."""
        entries = sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)
        size = entries * Output(Path("x"), self.tensors[:1], self.dtype, SHARD_BYTES).dtype.itemsize
        models = ", ".join(map(str, self.recipe.models))
        tensors, count = plural(len(self.tensors), "tensor"), plural(len(self.recipe.models), "model")
        text = f"{tensors}, {entries:,} entries, {size / 1e9:.3f} GB in {self.dtype}"
        return f"{self.recipe.title} of {count}: {models}\n{text}"


def plan(recipe: Recipe) -> Plan:
    """The merge that a recipe describes. Only configs, headers and tokenizers are read, and small adapters.

    Raises UserError for models that do not fit together, and as `plan.plan_tensors` does.
    """
    checkpoints = {spec: Checkpoint(spec) for spec in recipe.models}
    roles = [assign_roles(recipe, part) for part in recipe.slices]
    structure.check_alike(list(checkpoints.values()))
    for checkpoint in checkpoints.values():
        if checkpoint.spec.adapter:
            checkpoint.changes.append(add_adapter(checkpoint))
    first = checkpoints[recipe.base or recipe.slices[0].sources[0].model]
    tokens = vocabulary.plan_vocabulary(recipe, checkpoints, first)
    shapes: dict[Input, tuple[int, ...]] = {}
    for spec, checkpoint in checkpoints.items():
        if tokens:
            checkpoint.changes.append(tokens.change_of(checkpoint, checkpoints))
        for name, tensor in checkpoint.tensors.items():
            resized = tokens is not None and structure.VOCABULARY.fullmatch(name)
            shapes[Input(spec, name)] = (tokens.rows, *tensor.shape[1:]) if tokens and resized else tensor.shape
    if recipe.align:
        check_all(checkpoints, first, recipe.align, shapes)
    tensors = plan_tensors(recipe, checkpoints, shapes)
    layers = [i for role in roles for i in _layers(role.everyone[0], checkpoints)]
    dtype = recipe.out_dtype or first.dtype
    config = structure.stacked_config(first.hf_config, layers, dtype)
    if recipe.mixture:
        tensors, config = plan_mixture(recipe, checkpoints, tensors, shapes, dtype)
    if tokens:
        config["vocab_size"] = tokens.rows
    return Plan(recipe, checkpoints, tensors, config, dtype, tokens)


def _layers(source: Any, checkpoints: Checkpoints) -> range:
    return range(*(source.layers or (0, checkpoints[source.model].depth)))


def combine(
    recipe: Recipe,
    output: PathLike,
    *,
    progress: Progress = iter,
    score: Score | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the merge to a folder, and returns the report's figures of the whole.

    `progress` wraps the tensors that are left to be merged; `score` gives the held-out score of a folder with a model,
    which a greedy soup needs, and by which the barriers between models that are aligned are measured. A merge that was
    stopped continues. Raises UserError before a tensor is read for all that headers show, and for a tensor with NaN
    when it is read; InUse while another process writes the folder.
    """
    folder = as_local_path(output)
    for source in (source for part in recipe.slices for source in part.sources):
        if isinstance(source.statistics, dict):
            raise UserError(f"the statistics of {source.model} are not computed: launch.combine does, or name a file")
    merge = plan(recipe)
    target = merge.output(folder, shard_bytes)
    target.check()
    found: dict[str, Any] = {}
    if recipe.align and score:
        found["barriers"] = measure_barriers(recipe, functools.partial(_score_merge, folder, score))
    if recipe.rule.select:
        selected, found["soup"] = _selected(recipe, folder, score)
        merge = plan(selected)
        target = merge.output(folder, shard_bytes)
    with target.opened(_digest(merge)) as out:
        if recipe.align:
            found["moved_by_alignment"] = align_all(merge.checkpoints, merge.first, recipe.align)
        surveys = _surveys(merge)
        done = len(out.rows)
        for tensor in progress(merge.tensors[done:]):
            merge_tensor(merge, tensor, surveys, out)
        summary = _write_companions(merge, out, found)
        out.finish()
    return summary


def merge_tensor(merge: Plan, tensor: PlannedTensor, surveys: Mapping[str, Any], out: Output) -> None:
    """Merges one tensor or makes it, writes it, and records what that did; `surveys` are those of each method."""
    if tensor.make:
        made = tensor.make(tensor.shape)
        nothing: dict[str, Any] = {"kept": [], "models": [], "distances": {}, "gram": []}
        out.write(tensor.name, made, {"name": tensor.name, "entries": made.size, **nothing})
        return
    group = _read_group(merge, tensor)
    group.survey = surveys.get(tensor.method)
    row = report.measure(group) | {"name": tensor.name, "entries": group.tensors[0].size}
    merged = RULES[tensor.method].merge(group)
    row |= {"kept": group.kept, "models": [str(i.model) for i in tensor.inputs], "distances": {}}
    del group
    if not np.isfinite(merged).all():
        raise UserError(f"the merged tensor {tensor.name} holds NaN or infinite values: check the recipe's weights")
    for parent in tensor.parents:
        values = merge.checkpoints[parent.model].read(parent.name)
        row["distances"][str(parent.model)] = report.squared_distance(merged, values)
        del values
    out.write(tensor.name, merged, row)


def _read_group(merge: Plan, tensor: PlannedTensor) -> Group:
    recipe, checkpoints = merge.recipe, merge.checkpoints
    base = checkpoints[tensor.base.model].read(tensor.base.name, recipe.wide) if tensor.base else None
    tensors = [checkpoints[i.model].read(i.name, recipe.wide) for i in tensor.inputs]
    statistics = [
        {k: read_tensor(f"{k} of {tensor.name}", s, np.float32) for k, s in found.items()}
        for found in tensor.statistics
    ]
    flat = merge.hf_config.get("model_type") == "gpt2"  # its kernels are stored [in, out]
    return Group(tensor.name, base, tensors, tensor.shared, tensor.own, recipe.seed, None, statistics, 0 if flat else 1)


def _surveys(merge: Plan) -> dict[str, Any]:
    """What the rules read of all their tensors before they merge one, by method."""
    found = {}
    for method in dict.fromkeys(tensor.method for tensor in merge.tensors if tensor.method):
        rule, tensors = RULES[method], [tensor for tensor in merge.tensors if tensor.method == method]
        if rule.survey and rule.surveys(tensors[0].shared):
            groups = functools.partial(_groups, merge, tensors)
            found[method] = rule.survey(groups, tensors[0].shared, tensors[0].own)
    return found


def _groups(merge: Plan, tensors: Sequence[PlannedTensor]) -> Iterator[Group]:
    return (_read_group(merge, tensor) for tensor in tensors)


def _digest(merge: Plan) -> str:
    stamps = []
    for spec, checkpoint in merge.checkpoints.items():
        folder = checkpoint.folder
        paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        stamps.append([str(spec), [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]])
    names = [[t.name, t.shape, [list(map(str, i)) for i in t.inputs]] for t in merge.tensors]
    return digest_of(merge.recipe.text, stamps, names, merge.dtype)


def _selected(recipe: Recipe, folder: Path, score: Score | None) -> tuple[Recipe, dict[str, Any]]:
    """`(the recipe with the models that its rule selects by their score, what was tried and taken)`."""
    if score is None:
        raise UserError(f"{recipe.method} needs a held-out score: give score: {{config: FILE.py}} in the recipe")
    if len(recipe.slices) != 1:
        raise UserError(f"{recipe.method} selects whole models: list them in models, not in slices")
    (part,) = recipe.slices
    select = recipe.rule.select
    assert select is not None

    def of(indices: tuple[int, ...]) -> Recipe:
        chosen = dataclasses.replace(part, sources=tuple(part.sources[i] for i in indices))
        return dataclasses.replace(recipe, slices=(chosen,))

    tried: list[dict[str, Any]] = []

    def score_of(indices: tuple[int, ...]) -> float:
        value = _score_merge(folder, score, dataclasses.replace(of(indices), method="uniform_soup"))
        tried.append({"models": names(indices), "score": value})
        return value

    def names(indices: tuple[int, ...]) -> list[str]:
        return [str(part.sources[i].model) for i in indices]

    members = select(len(part.sources), score_of)
    return of(members), {"members": names(members), "tried": tried}


def _score_merge(folder: Path, score: Score, recipe: Recipe) -> float:
    """The score of a merge, which is written beside `folder` for as long as that takes."""
    candidate = folder.with_name(f".{folder.name}.candidate")
    shutil.rmtree(candidate, ignore_errors=True)
    try:
        combine(recipe, candidate)
        return score(candidate)
    finally:
        shutil.rmtree(candidate, ignore_errors=True)


def _write_template(folder: Path, template: str) -> None:
    """Writes the one chat template of a checkpoint, in place of that of `tokenizer_config.json`."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.exists():
        kept = {key: value for key, value in schema.decode(config).items() if key != "chat_template"}
        files.write_json(config, kept)


def _write_companions(merge: Plan, out: Output, found: dict[str, Any]) -> dict[str, Any]:
    """Writes all that lies beside the tensors; `found` is for the report."""
    recipe, folder = merge.recipe, merge.first.folder
    based = merge.tensors[0].base is not None
    summary = report.summarize(out.rows, [i.model for i in merge.tensors[0].inputs], based) | found
    report.write(out.scratch, out.rows, summary)
    files.write_json(out.scratch / "config.json", merge.hf_config)
    for name in (*TOKENIZER_FILES, *VOCABULARIES, GENERATION):
        if (folder / name).exists():
            shutil.copyfile(folder / name, out.scratch / name)
    if not folder.is_dir():
        merge.first.source.tokenizer().save(out.scratch)
    if merge.vocabulary:
        merge.vocabulary.write(out.scratch)
    if recipe.chat_template and recipe.chat_template != "auto":
        _write_template(out.scratch, recipe.chat_template)
    (out.scratch / RECIPE).write_text(recipe.text, encoding="utf-8")
    (out.scratch / "README.md").write_text(card.to_markdown(recipe, summary), encoding="utf-8")
    return summary
