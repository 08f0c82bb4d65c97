"""The version of the code that computes a cell: the commit, or the version of the installed package."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def code_version() -> str:
    """The commit of the source tree, with `-dirty` after it if files differ from it, or `lowrank VERSION`."""
    here = Path(__file__).parent
    try:
        words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        tracked = subprocess.run([*words[:3], "ls-files", __file__], capture_output=True, text=True, check=True).stdout
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        tracked = found = ""
    return found if tracked and found else f"lowrank {importlib.metadata.version('lowrank')}"
