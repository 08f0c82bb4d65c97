"""Engines that write job files and hand them to a cluster's tool, which starts the workers.

--topology=v5e:4x4[,slices=2]  the TPU slice of each worker, or the slices that one run spans
--device=h100:8     the GPUs of each host, and --hosts=2, the hosts of each worker (slurm, skypilot)
--workers=4         the number of workers
--image=NAME        the container image with lowrank (jobset, xpk); elsewhere --setup=COMMAND installs it
--env=NAME=VALUE    an environment variable of the workers; may be repeated
--spot              machines that may be preempted
--queue=NAME        the queue of Kueue, or the partition of Slurm
--cluster=NAME --project=NAME --zone=NAME  where the machines are (xpk, skypilot, tpu_vm)
--max_restarts=3    restarts after failures; preempted and stopped workers start again without being counted
--name=NAME         the job's name; by default that of the folder
--output=DIR        the folder of the job files; by default jobs/NAME

--dry_run prints the job files and the commands as well.
"""

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.engines.engine import Engine
from launch.engines.job import Job, add_flags, read_job
from lowrank.core.errors import UserError
from lowrank.core.files import write_text
from lowrank.sweeps.folder import StudyFolder

Files = Callable[[Job], Mapping[str, str]]  # {file name: text}
Commands = Callable[[Job, Path], Sequence[Sequence[str]]]  # with the folder of the files


def cluster_engine(
    tool: str, install: str, files: Files, commands: Commands, check: Callable[[Job], None], python: str = "python"
) -> Engine:
    """The engine that writes `files` and runs `commands`, at the same time if there are several.

    `install` says how to get the `tool`, and `check` raises UserError for a job that the engine cannot start. The
    workers run under `python`.
    """

    def read(args: argparse.Namespace) -> Job:
        job = read_job(args, python)
        check(job)
        return job

    def check_args(args: argparse.Namespace) -> None:
        read(args)
        if not args.dry_run and shutil.which(tool) is None:
            raise UserError(f"--engine={args.engine} runs {tool}, which is not installed: {install}")

    def describe(args: argparse.Namespace) -> str:
        job = read(args)
        texts = [f"# {_output(args, job) / name}\n{text}" for name, text in files(job).items()]
        lines = (f"$ {shlex.join(words)}" for words in commands(job, _output(args, job)))
        return "\n".join(["", *texts, *lines, ""])

    def run(study: StudyFolder, args: argparse.Namespace) -> int:
        job = read(args)
        for name, text in files(job).items():
            write_text(_output(args, job) / name, text)
        code = run_commands(commands(job, _output(args, job)))
        print(f"the state of the study: python -m launch.status {study.path}")
        return code

    return Engine(add_flags, check_args, run, describe)


def _output(args: argparse.Namespace, job: Job) -> Path:
    return Path(args.output or f"jobs/{job.name}")


def run_commands(commands: Sequence[Sequence[str]]) -> int:
    """Runs commands at the same time; returns the first exit code that is not 0. Ctrl-C reaches them too."""
    for words in commands:
        print("$", shlex.join(words), flush=True)
    processes = [subprocess.Popen(words) for words in commands]
    while True:
        try:
            codes = [process.wait() for process in processes]
            return next((code if code > 0 else 128 - code for code in codes if code), 0)
        except KeyboardInterrupt:
            continue  # each of them has got the signal and cleans up
