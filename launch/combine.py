"""Merges models or adapters: `python -m launch.combine --recipe=FILE.yaml --output=DIR [--dry_run]`.

The recipe is mergekit's YAML, or ours: docs/guides/merge_models.md. The output is a Hugging Face checkpoint with a
model card and a report, or an adapter where the recipe has the key `adapter`. A merge that was stopped continues where
it was. `--dry_run` checks everything, prints the plan and writes nothing. The last line is the command that trains the
result further. Bad input is one line on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from launch import command, merge_score, merge_statistics
from launch.continued import training_command
from lowrank.core import files
from lowrank.core.errors import UserError
from lowrank.core.paths import as_local_path
from lowrank.merging import adapter_merge
from lowrank.merging.combine import combine, plan
from lowrank.merging.recipe import Recipe, read_recipe


def main(argv: Sequence[str]) -> None:
    """Merges what the recipe describes."""
    parser = command.Parser("launch.combine", __doc__)
    parser.add_argument("--recipe", help="the recipe, a YAML file")
    parser.add_argument("--output", help="where the result goes: an empty folder, or a new one")
    parser.add_argument("--dry_run", action="store_true", help="check the recipe and print the plan, without merging")
    try:
        options = parser.parse_args(argv)
        if not (options.recipe and options.output):
            raise UserError("--recipe=FILE.yaml and --output=DIR are both required")
        print(_run(read_recipe(options.recipe), options))
    except UserError as e:
        command.fail(e)


def _run(recipe: Recipe, options: argparse.Namespace) -> str:
    if recipe.adapter is not None:
        adapters = adapter_merge.plan_adapters(recipe)
        if options.dry_run:
            merge_statistics.check(recipe)
            adapter_merge.check_output(adapters, as_local_path(options.output))
            return f"{recipe.method} of {len(adapters.adapters)} adapters into one: {len(adapters.paths)} modules"
        with files.held(options.output):
            recipe = merge_statistics.with_files(recipe, options.output, _batches)
        report = adapter_merge.combine_adapters(recipe, options.output, progress=_progress)
        base, merged = adapters.base, f"merged into {options.output}: largest relative error of a module "
        again = training_command(base.spec.path, base.hf_config, adapter=options.output)
        return f"{merged}{report['worst']:.2e}\nto continue training it:\n{again}"
    merge = plan(recipe)
    merge.output(as_local_path(options.output)).check()
    merge_statistics.check(recipe)
    score = merge_score.scorer(recipe.score) if recipe.score else None
    print(merge)
    if options.dry_run:
        return "nothing was written"
    recipe = merge_statistics.with_files(recipe, options.output, _batches)
    summary = combine(recipe, options.output, progress=_progress, score=score)
    if "soup" in summary:
        print(f"the soup of {', '.join(summary['soup']['members'])}")
    distances = ", ".join(f"{name} {value:.3g}" for name, value in summary["relative_distance"].items())
    merged = f"merged into {options.output}: relative distance to {distances}"
    for name, share in summary.get("moved_by_alignment", {}).items():
        merged += f"\n{name}: {share:.1%} of the units and heads were moved to align it"
    for name, line in summary.get("barriers", {}).items():
        before = f"{line['barrier_before']:.4g} before alignment and " if "barrier_before" in line else ""
        merged += f"\nbarrier on the line to {name}: {before}{line['barrier_after']:.4g} after it"
    whole = recipe.mixture is not None or len(recipe.slices) > 1
    return f"{merged}\nto continue training it:\n{training_command(options.output, merge.hf_config, whole=whole)}"


def _batches(items: Any) -> Any:
    return tqdm(items, desc="statistics", unit="batch", dynamic_ncols=True)


def _progress(items: Any) -> Any:
    return tqdm(items, unit="tensor", dynamic_ncols=True)


if __name__ == "__main__":
    main(sys.argv[1:])
