"""Compiled programs on disk, so that a run that starts again does not compile again."""

import re
from pathlib import Path

import jax

from lowrank.core.paths import expand
from lowrank.core.processor import processor_name

FOLDER = "~/.cache/lowrank/programs"


def keep_programs(folder: str | Path = FOLDER) -> None:
    """Keeps every program that this process compiles in `folder`, and takes from there what is compiled already.

    The programs lie in a subfolder for this processor: code for another one may use instructions that it lacks.
    """
    name = re.sub(r"\W+", "-", processor_name()).lower()
    jax.config.update("jax_compilation_cache_dir", str(Path(expand(folder)) / name))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
