"""What a cluster needs to know of the workers that it starts, and the flags that say it.

A worker takes the machines of one TPU slice (or of several, where a run spans them), or machines with GPUs or CPUs. The
same command runs on each of its hosts: the process with index 0 claims cells, and the others follow it.
"""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.exit_codes import STOPPED
from lowrank.core.paths import in_bucket
from lowrank.memory import devices, tpus

RESTART = STOPPED  # the exit code after which a worker is started again
# The machines of these engines bring another Python than the one that lowrank needs, and no packages.
PYTHON = ".venv/bin/python"
SETUP = (
    "python3 -m pip install -q uv && python3 -m uv venv -q --python 3.12 .venv && "
    f"python3 -m uv pip install -q --python {PYTHON} -e '.[{{extras}}]'"
)
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # of objects of Kubernetes and of Google Cloud, with an index


@dataclasses.dataclass(frozen=True)
class Job:
    """The workers of one study on a cluster."""

    name: str
    folder: str  # of the study, as every machine sees it
    command: tuple[str, ...]  # of one worker
    workers: int = 1
    topology: str = ""  # of one TPU slice, such as v5e:4x4; empty: other machines
    slices: int = 1  # of one worker
    device: str = ""  # the GPUs of one host, such as h100:8
    hosts: int = 1  # of one worker, where it has no TPU slice
    image: str = ""  # of a container with lowrank
    setup: str = ""  # the shell command that installs lowrank on a new machine
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spot: bool = False
    queue: str = ""
    cluster: str = ""
    project: str = ""
    zone: str = ""
    max_restarts: int = 3  # after failures; preemptions and stops do not count

    @property
    def tpu(self) -> tpus.Tpu:
        """The figures of the chips."""
        return tpus.TPUS[self.topology.partition(":")[0]]

    def worker_name(self, index: int) -> str:
        """The name of a worker."""
        return f"{self.name}-{index}"

    def worker_shell(self, worker: str, process: str = "") -> str:
        """The shell command of one process of a worker.

        `worker` and `process` are shell text, such as `$TPU_WORKER_ID`. A process without an index is the only one.
        """
        words = shlex.join(self.command)
        return f'{words} --group="{worker}" --process="{process}"' if process else words


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engines that submit jobs to a cluster."""
    for flag in ("--name", "--image", "--setup", "--queue", "--cluster", "--project", "--zone", "--output"):
        parser.add_argument(flag, default="", help=argparse.SUPPRESS)
    parser.add_argument("--hosts", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--max_restarts", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--env", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--spot", action="store_true", help=argparse.SUPPRESS)


def read_job(args: argparse.Namespace, python: str = "python") -> Job:
    """The job that the flags describe, whose workers run under `python`. Raises UserError for flags that do not fit."""
    if not args.folder:
        raise UserError(f"--engine={args.engine} needs --folder=DIR, which all of its machines must see")
    target = devices.parse_topology(args.topology) if args.topology else None
    name = args.name or default_name(args.folder)
    if not NAME.fullmatch(name):
        raise UserError(f"--name={name} is not a name of a job: use up to 40 lower-case letters, digits and dashes")
    for flag in ("workers", "hosts", "max_restarts"):
        if getattr(args, flag) < (flag == "hosts"):
            raise UserError(f"--{flag}={getattr(args, flag)} is not a number from {int(flag == 'hosts')} on")
    fields = ("device", "hosts", "image", "setup", "spot", "queue", "cluster", "project", "zone", "max_restarts")
    return Job(
        name=name,
        folder=args.folder,
        command=(python, "-m", "launch.worker", args.folder),
        workers=args.workers or 1,
        topology=target.topology if target else "",
        slices=target.slices if target else 1,
        environment=read_environment(args.env),
        **{field: getattr(args, field) for field in fields},
    )


def default_name(folder: str) -> str:
    """A name for the workers of a study, after its folder."""
    return re.sub(r"[^a-z0-9]+", "-", folder.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].strip("-")


def read_environment(words: list[str]) -> dict[str, str]:
    """`{name: value}` of `--env=NAME=VALUE`. Raises UserError for another form."""
    for word in words:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", word, re.DOTALL):
            raise UserError(f"--env={word} is not of the form NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def require(job: Job, engine: str, **flags: str) -> None:
    """Raises UserError for the first of the fields `flags` that is empty, with its example: `image='REGISTRY/NAME'`."""
    for field, example in flags.items():
        if not getattr(job, field):
            raise UserError(f"--engine={engine} needs --{field}={example}")


def require_bucket(job: Job, engine: str) -> None:
    """Raises UserError for a study's folder that the machines of a cluster do not see."""
    if not in_bucket(job.folder):
        raise UserError(
            f"--folder={job.folder} lies on this machine, and those of --engine={engine} do not see it: "
            "give gs://BUCKET/FOLDER"
        )


def refuse(job: Job, engine: str, **defaults: Any) -> None:
    """Raises UserError for a field of `defaults` that has another value, which the engine cannot heed."""
    for field, default in defaults.items():
        if getattr(job, field) != default:
            raise UserError(f"--engine={engine} cannot heed --{field}={getattr(job, field)}: leave it out")
