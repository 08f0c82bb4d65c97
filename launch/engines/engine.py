"""The type of an engine."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from lowrank.sweeps.folder import StudyFolder


def _nothing(args: argparse.Namespace) -> str:
    del args
    return ""


class Engine(NamedTuple):
    """One way to start workers."""

    add_flags: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]  # raises UserError for flags that do not fit
    run: Callable[[StudyFolder, argparse.Namespace], int]  # returns the exit code of the command
    describe: Callable[[argparse.Namespace], str] = _nothing  # what `--dry_run` says of it, beside the cells
