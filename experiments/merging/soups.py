"""Soups of the runs of one task, which differ in their seed: the mean of all, and the mean of those that help."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.merging import world
from experiments.merging.world import World
from lowrank.merging.rules import greedy_soup


def scores(w: World, task: str, adapters: Sequence[Path]) -> dict[str, Any]:
    """Test scores (nats per token) of every run, of the run that validation chooses, and of both soups."""
    found = [world.updates(w, path) for path in adapters]
    held_out: dict[tuple[int, ...], float] = {}

    def nll(members: tuple[int, ...], split: str) -> float:
        share = 1 / len(members)
        params = w.with_kernels(world.add(w.kernels(), *((share, found[i]) for i in members)))
        return w.nll([params], task, split)

    def score(members: tuple[int, ...]) -> float:
        held_out[members] = nll(members, "validation")
        return -held_out[members]

    members = greedy_soup.select(len(found), score)
    runs = [nll((i,), "test") for i in range(len(found))]
    best = min(range(len(found)), key=lambda i: held_out[i,])
    return {
        "runs": runs,
        "best": runs[best],
        "uniform": nll(tuple(range(len(found))), "test"),
        "greedy": nll(members, "test"),
        "members": list(members),
    }
