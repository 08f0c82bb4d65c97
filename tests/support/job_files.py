"""The job files that an engine writes, read from what `--dry_run` prints, and scripts run with fake tools."""

import os
import re
import shlex
import subprocess

from launch import sweep
from launch.engines import ENGINES

FOLDER = "gs://bucket/Ranks_of_LoRA"


def describe(engine, *flags):
    """What `--dry_run` prints of an engine."""
    args, _ = sweep.parse(["--study=s.py", f"--folder={FOLDER}", "--dry_run", f"--engine={engine}", *flags])
    ENGINES[engine].check(args)
    return ENGINES[engine].describe(args)


def files(text):
    """`{name: text}` of the files in it, and the commands."""
    body, *commands = re.split(r"^\$ ", text, flags=re.MULTILINE)
    parts = re.split(r"^# jobs/[^/\n]+/(\S+)\n", body, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True)), [shlex.split(command) for command in commands]


def fake_tools(folder, **scripts):
    """A folder of commands that note their arguments, then do as `scripts` say."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in scripts.items():
        note = f'{{ printf "%s\\0" {name} "$@"; printf "\\1"; }} >> "{folder}/calls"'
        tools.joinpath(name).write_text(f"#!/usr/bin/env bash\n{note}\n{script}\n")
        tools.joinpath(name).chmod(0o755)
    return tools


def calls(folder, *words):
    """The arguments of the calls of the fake tools that start with `words`, in order."""
    path = folder / "calls"
    lines = [line.split("\0")[:-1] for line in path.read_text().split("\1")[:-1]] if path.exists() else []
    return [line for line in lines if line[: len(words)] == list(words)]


def run_script(text, tools, *args, **variables):
    path = tools.parent / "script.sh"
    path.write_text(text)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **variables}
    return subprocess.run(["bash", str(path), *args], env=environment, timeout=60, check=False).returncode
