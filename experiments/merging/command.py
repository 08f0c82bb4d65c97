"""Runs the study: `python -m experiments.merging [--size=small] [--workers=1] [--folder=DIR] [--results=DIR]`.

    --size=small     ci (two steps of a model of one block, to see that all works), or small
    --workers=1      0 writes the tables of what is done
    --folder=DIR     the folder of adapters and scores; by default runs/merging/SIZE
    --results=DIR    where tables and plots go; by default experiments/merging/results for `small`, else in runs/

It trains the experts and the joint models, merges them by every rule, scores each model, and writes the tables and, for
the committed results, the README's. The same command continues a study that was stopped: an adapter, the statistics of
one, or the scores of a model are not computed again while their file exists.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.merging import experts, sizes, soups, table, tasks, world
from experiments.merging.sizes import Size
from experiments.merging.world import World
from experiments.protocol import plain_command
from lowrank.core.files import write_json
from lowrank.merging.rules import RULES

NAME = "merging"
Cell = tuple[str, Callable[[World], Any]]  # the name of a file of numbers, and what computes them


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parts = (sizes.get_size, run, table.write_tables, table.markdown)
    return plain_command.main(NAME, __doc__, argv, *parts)


def run(size: Size, folder: Path) -> None:
    """Computes every cell of the study whose file is missing."""
    tasks.write_texts()
    found = world.load(size)
    for name, compute in tqdm(list(cells(size, folder)), unit="cell", dynamic_ncols=True):
        if not (path := folder / f"{name}.json").exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, compute(found))


def expert_folder(folder: Path, task: str, seed: int) -> Path:
    """The adapter of a task and a seed."""
    return folder / "adapters" / f"{task}-{seed}"


def cells(size: Size, folder: Path) -> Iterator[Cell]:
    """The cells in the order in which they run."""
    yield "base-0", lambda w: w.scores([w.base.params])
    for seed in range(size.seeds):
        for task in tasks.TASKS:
            yield f"{task}-{seed}", lambda w, t=task, s=seed: _expert(w, folder, (t,), s)
        yield f"joint-{seed}", lambda w, s=seed: _expert(w, folder, tuple(tasks.TASKS), s)
        yield f"ensemble-{seed}", lambda w, s=seed: _ensemble(w, folder, s)
        for how in size.merges:
            yield f"{how.name}-{seed}", lambda w, h=how, s=seed: _merge(w, folder, h, s)
        for share in size.shares:
            yield f"joint-minus-{share:g}-{seed}", lambda w, c=share, s=seed: _negate(w, folder, c, s)
    for task in tasks.TASKS:
        paths = [expert_folder(folder, task, seed) for seed in range(size.seeds)]
        yield f"soup-{task}", lambda w, t=task, p=paths: soups.scores(w, t, p)


def _expert(w: World, folder: Path, names: Sequence[str], seed: int) -> dict[str, float]:
    path = expert_folder(folder, names[0] if len(names) == 1 else "joint", seed)
    experts.train(w.base, w.size, names, seed, path)
    return w.scores([w.with_kernels(world.add(w.kernels(), (1.0, world.updates(w, path))))])


def _ensemble(w: World, folder: Path, seed: int) -> dict[str, float]:
    found = [world.updates(w, expert_folder(folder, task, seed)) for task in tasks.TASKS]
    return w.scores([w.with_kernels(world.add(w.kernels(), (1.0, update))) for update in found])


def _merge(w: World, folder: Path, how: sizes.Merge, seed: int) -> dict[str, float]:
    paths = {task: expert_folder(folder, task, seed) for task in tasks.TASKS}
    kind = RULES[how.rule].statistics
    found = [world.measured(w, task, path, kind) for task, path in paths.items()] if kind else []
    of = [world.updates(w, path) for path in paths.values()]
    return w.scores([w.with_kernels(world.merge(w, how, of, found, seed))])


def _negate(w: World, folder: Path, share: float, seed: int) -> dict[str, float]:
    joint, removed = (world.updates(w, expert_folder(folder, of, seed)) for of in ("joint", w.size.negated))
    return w.scores([w.with_kernels(world.add(w.kernels(), (1.0, joint), (-share, removed)))])
