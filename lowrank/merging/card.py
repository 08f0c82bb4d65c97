"""The model card of a merge: its parents, its recipe, and what the report says of the whole."""

from collections.abc import Mapping
from typing import Any

from lowrank.merging.recipe import Recipe


def to_markdown(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """The text of `README.md`, with the metadata that model hubs read."""
    models = "".join(f"- {model}\n" for model in recipe.models)
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in summary["relative_distance"].items())
    lines = (
        [f"Sign conflicts of the task vectors: {summary['sign_conflicts']:.2%} of the entries."]
        if ("sign_conflicts" in summary)
        else []
    )
    if "share_trimmed" in summary:
        shares = ", ".join(f"{share:.1%}" for share in summary["share_trimmed"])
        lines.append(f"Share of each task vector that was dropped: {shares}.")
    if "soup" in summary:
        lines.append(f"Members of the soup: {', '.join(summary['soup']['members'])}.")
    figures = "\n\n".join(lines)
    return (
        f"---\nbase_model:\n{models}tags:\n- merge\n- lowrank\nlibrary_name: transformers\n---\n\n"
        f"# A merge: {recipe.title.rstrip(',')}\n\n"
        f"Preset of the options that the recipe leaves out: {recipe.preset}. Seed: {recipe.seed}.\n\n"
        f"| parent | relative distance |\n|---|---|\n{table}\n{figures}\n\n"
        f"## Recipe\n\n```yaml\n{recipe.text.strip()}\n```\n"
    )
