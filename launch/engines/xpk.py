"""The engine `xpk`: a workload of Google's xpk for each worker, on a GKE cluster that `xpk cluster create` has made.

xpk restarts a workload whose pods end with code 42 or by a signal, as a preempted one does, and fails it at once for
any other code. It gives each workload exclusive node pools.
"""

from pathlib import Path

from launch.engines import job as jobs
from launch.engines.cluster import cluster_engine
from launch.engines.job import RESTART, Job
from lowrank.core.errors import UserError
from lowrank.memory import tpus

RESTARTS = 1000  # it counts preemptions alone
UNKNOWN = ("v5e:1x1", "v5e:2x2")  # which xpk does not start


def files(job: Job) -> dict[str, str]:
    """xpk writes its own."""
    del job
    return {}


def commands(job: Job, folder: Path) -> list[list[str]]:
    """A command for each worker."""
    del folder
    return [_command(job, job.worker_name(i)) for i in range(job.workers)]


def _command(job: Job, worker: str) -> list[str]:
    hosts = tpus.hosts(job.topology)
    slice_index = "${MEGASCALE_SLICE_ID:-0}"
    process = f"$(({slice_index} * {hosts} + TPU_WORKER_ID))" if hosts * job.slices > 1 else ""
    where = {"cluster": job.cluster, "project": job.project, "zone": job.zone}
    return [
        *("xpk", "workload", "create", f"--workload={worker}"),
        *(f"--{flag}={value}" for flag, value in where.items() if value),
        f"--tpu-type={tpus.accelerator_type(job.topology)}",
        f"--num-slices={job.slices}",
        f"--docker-image={job.image}",
        f"--command=exec {job.worker_shell(worker, process)}",
        f"--max-restarts={RESTARTS}",
        f"--restart-on-exit-codes={RESTART}",
        *(f"--env={name}={value}" for name, value in job.environment.items()),
        *(["--spot"] if job.spot else []),
    ]


def check(job: Job) -> None:
    """Raises UserError for a job that xpk cannot start."""
    jobs.require(job, "xpk", topology="v5e:4x4", image="REGISTRY/NAME", cluster="NAME")
    jobs.require_bucket(job, "xpk")
    jobs.refuse(job, "xpk", device="", hosts=1, setup="", queue="", max_restarts=3)
    if job.topology in UNKNOWN:
        raise UserError(f"--topology={job.topology} is not known to xpk: its smallest v5e slice is v5e:2x4")


ENGINE = cluster_engine("xpk", "pip install xpk", files, commands, check)
