"""The engine `slurm`: a job array of Slurm with one task of the array for each worker.

Slurm starts a preempted job again (`--requeue`), and the script asks for the same after code 42. Two minutes before the
time limit of its partition, the worker gets SIGTERM: it saves, ends with 42 and is queued again. Any other code ends
the task of the array. A worker on one host sees all of its GPUs; on several, each GPU has a process of its own, as JAX
expects it under Slurm.
"""

import shlex
from pathlib import Path

from launch.engines import job as jobs
from launch.engines.cluster import cluster_engine
from launch.engines.job import RESTART, Job
from lowrank.memory import devices

WARNING = 120  # seconds from SIGTERM to the time limit


def files(job: Job) -> dict[str, str]:
    """The script for sbatch."""
    gpus = devices.parse_device(job.device).num_devices if job.device else 0
    options = {
        "job-name": job.name,
        "array": f"0-{job.workers - 1}",
        "nodes": job.hosts,
        "ntasks-per-node": max(1, gpus) if job.hosts > 1 else 1,
        "gpus-per-node": f"{job.device.partition(':')[0]}:{gpus}" if gpus else "",
        "partition": job.queue,
        "output": f"{job.name}-%a.txt",
        "open-mode": "append",
        "signal": f"TERM@{WARNING}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value != ""]
    return {f"{job.name}.sh": "\n".join(["#!/usr/bin/env bash", *lines, "#SBATCH --requeue", *_body(job), ""])}


def _body(job: Job) -> list[str]:
    process = "$SLURM_PROCID" if job.hosts > 1 else ""
    worker = job.worker_shell(f"{job.name}-$SLURM_ARRAY_TASK_ID", process)
    return [
        "set -u",
        *([job.setup] if job.setup else []),
        *(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()),
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(f'exec {worker}')}",
        "code=$?",
        f'if [ "$code" -eq {RESTART} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi',
        'exit "$code"',
    ]


def commands(job: Job, folder: Path) -> list[list[str]]:
    """The command that queues the array."""
    return [["sbatch", str(folder / f"{job.name}.sh")]]


def check(job: Job) -> None:
    """Raises UserError for a job that Slurm cannot start."""
    jobs.refuse(job, "slurm", topology="", image="", cluster="", project="", zone="", spot=False, max_restarts=3)


INSTALL = "run this command on a login node of the Slurm cluster"
ENGINE = cluster_engine("sbatch", INSTALL, files, commands, check)
