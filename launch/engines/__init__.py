"""Engines: each starts workers (`launch.worker`) on a study's folder in its own way. One file each, one line here.

An engine adds its flags to the parser of `launch.sweep`, and starts workers. Claims, retries and timeouts are the
workers' own, and the results are files: an engine has nothing else to do.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from launch.engines import local
from lowrank.sweeps.folder import StudyFolder


class Engine(NamedTuple):
    """One way to start workers."""

    add_flags: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]  # raises UserError for flags that do not fit, and for a missing tool
    run: Callable[[StudyFolder, argparse.Namespace], int]  # returns the exit code of the command


ENGINES: dict[str, Engine] = {
    "local": Engine(local.add_flags, local.check, local.run),
}
