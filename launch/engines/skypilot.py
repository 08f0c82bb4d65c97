"""The engine `skypilot`: a managed job of SkyPilot for each worker, on a TPU slice of Google Cloud or on GPUs of any.

SkyPilot recovers a preempted job, and one that ends with code 42, without counting it; it restarts a job that has
failed up to `--max_restarts` times. It copies this folder to the machines, and `--setup` installs lowrank there.
"""

from pathlib import Path
from typing import Any

import yaml

from launch.engines import job as jobs
from launch.engines import tpu_vm
from launch.engines.cluster import cluster_engine
from launch.engines.job import PYTHON, RESTART, SETUP, Job
from lowrank.memory import devices, tpus

PORT = 8476  # of a run's coordinator
JAX_CLUSTER = (
    f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n1):{PORT}"\n'
    'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"\n'
)


def files(job: Job) -> dict[str, str]:
    """A task of SkyPilot for each worker."""
    return {
        f"{job.worker_name(i)}.yaml": yaml.safe_dump(task(job, job.worker_name(i)), sort_keys=False)
        for i in range(job.workers)
    }


def commands(job: Job, folder: Path) -> list[list[str]]:
    """A command for each worker."""
    words = ["sky", "jobs", "launch", "--yes", "--detach-run"]
    return [[*words, str(folder / f"{job.worker_name(i)}.yaml")] for i in range(job.workers)]


def task(job: Job, worker: str) -> dict[str, Any]:
    """The task of one worker."""
    recovery = {"max_restarts_on_errors": job.max_restarts, "recover_on_exit_codes": [RESTART]}
    resources = {**_machines(job), "use_spot": job.spot, "job_recovery": recovery}
    if job.zone:
        resources = {"infra": f"gcp/{job.zone.rpartition('-')[0]}/{job.zone}", **resources}
    before, process = "", ""
    if job.topology and tpus.hosts(job.topology) > 1:
        process = tpu_vm.HOST_INDEX
    elif job.hosts > 1:
        before, process = JAX_CLUSTER, "$SKYPILOT_NODE_RANK"
    return {
        "name": worker,
        "resources": resources,
        "num_nodes": job.hosts,
        "workdir": ".",
        **({"envs": dict(job.environment)} if job.environment else {}),
        "setup": job.setup or SETUP.format(extras="gcs,tpu" if job.topology else "gcs,cuda" if job.device else "gcs"),
        "run": f"{before}exec {job.worker_shell(worker, process)}\n",
    }


def _machines(job: Job) -> dict[str, Any]:
    if job.topology:
        kind = job.topology.partition(":")[0]
        runtime = {"runtime_version": tpu_vm.RUNTIMES[kind], "tpu_vm": True}
        return {"accelerators": f"tpu-{tpus.accelerator_type(job.topology)}", "accelerator_args": runtime}
    if job.device:
        return {
            "accelerators": f"{job.device.partition(':')[0].upper()}:{devices.parse_device(job.device).num_devices}"
        }
    return {}


def check(job: Job) -> None:
    """Raises UserError for a job that SkyPilot cannot start."""
    jobs.refuse(job, "skypilot", slices=1, queue="", cluster="", project="", image="")
    jobs.require_bucket(job, "skypilot")
    if job.topology:
        jobs.refuse(job, "skypilot", hosts=1)
        tpu_vm.check_generation(job, "skypilot")


INSTALL = "pip install 'skypilot[gcp]'"
ENGINE = cluster_engine("sky", INSTALL, files, commands, check, python=PYTHON)
