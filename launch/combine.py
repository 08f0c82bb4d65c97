"""Merges models or adapters: `python -m launch.combine --recipe=FILE.yaml --output=DIR [--dry_run]`.

The recipe is mergekit's YAML, or ours: docs/guides/merge_models.md. The output is a Hugging Face checkpoint with a
model card and a report, or an adapter where the recipe has the key `adapter`. A merge that was stopped continues where
it was. `--dry_run` checks everything, prints the plan and writes nothing. Bad input is one line on stderr and exit
code 2.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from launch import command
from lowrank.core.errors import UserError
from lowrank.core.paths import as_local_path
from lowrank.merging import adapter_merge
from lowrank.merging.combine import combine, plan
from lowrank.merging.output import check_new
from lowrank.merging.recipe import Recipe, read_recipe

_RECIPE = flags.DEFINE_string("recipe", None, "The recipe, a YAML file.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the result goes: an empty folder, or a new one.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the recipe and print the plan, without merging.")


def main(argv: Sequence[str]) -> None:
    """Merges what the recipe describes."""
    del argv
    try:
        if not (_RECIPE.value and _OUTPUT.value):
            raise UserError("--recipe=FILE.yaml and --output=DIR are both required")
        recipe = read_recipe(_RECIPE.value)
        print(_run(recipe))
    except UserError as e:
        command.fail(e)


def _run(recipe: Recipe) -> str:
    if recipe.adapter is not None:
        if _DRY_RUN.value:
            adapters = adapter_merge.plan_adapters(recipe)
            check_new(as_local_path(_OUTPUT.value))
            return f"{recipe.method} of {len(adapters.adapters)} adapters into one: {len(adapters.paths)} modules"
        report = adapter_merge.combine_adapters(recipe, _OUTPUT.value, progress=_progress)
        return f"merged into {_OUTPUT.value}: largest relative error of a module {report['worst']:.2e}"
    merge = plan(recipe)
    merge.output(as_local_path(_OUTPUT.value)).check()
    print(merge)
    if _DRY_RUN.value:
        return "nothing was written"
    summary = combine(recipe, _OUTPUT.value, progress=_progress)
    distances = ", ".join(f"{name} {value:.3g}" for name, value in summary["relative_distance"].items())
    return f"merged into {_OUTPUT.value}: relative distance to {distances}"


def _progress(items: Any) -> Any:
    return tqdm(items, unit="tensor", dynamic_ncols=True)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
