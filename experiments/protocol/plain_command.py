"""The command of a study whose runs are not configs of `launch.main`: what is missing is run, then the tables."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.protocol import command as study_command
from experiments.protocol.experiment import ROOT
from launch import command
from lowrank.core.compilation_cache import keep_programs
from lowrank.core.errors import UserError


def main(
    name: str,
    text: str,
    argv: Sequence[str],
    get_size: Callable[[str], Any],
    run: Callable[[Any, Path], None],
    write: Callable[[Any, Path, Path], None],
    markdown: Callable[[Path], str],
) -> int:
    """Runs the command of a study without configs; returns the exit code.

    `get_size` raises UserError for an unknown name, `run(size, folder)` computes what is missing, with compiled
    programs kept, `write(size, folder, results)` writes the tables, and `markdown(results)` reads them.
    """
    try:
        options = _parse(name, text, argv)
        size = get_size(options.size)
        if options.workers:
            keep_programs()
            run(size, options.folder)
        write(size, options.folder, options.results)
        if options.results == ROOT / name / "results":
            tables.rewrite(ROOT / name / "README.md")
        print(markdown(options.results))
    except (OSError, UserError) as e:
        return command.print_error(e)
    return 0


def _parse(name: str, text: str, argv: Sequence[str]) -> argparse.Namespace:
    """The options of a study without configs, whose folders are filled in: `folder` and `results`, both paths.

    Raises UserError for a change of a config.
    """
    options, changes = study_command.parse(name, text, argv)
    if changes:
        raise UserError(f"{changes[0]}: this study has no config")
    options.folder = Path(options.folder or f"runs/{name}/{options.size}")
    committed = ROOT / name / "results" if options.size == "small" else options.folder / "results"
    options.results = Path(options.results or committed)
    return options
