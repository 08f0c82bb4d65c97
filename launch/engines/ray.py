"""The engine `ray`: workers on a cluster of Ray, which this command watches to the end.

--ray_address=HOST:6379  an existing cluster (or `auto`), whose machines have lowrank and see the study's folder; by
                         default, Ray runs on this machine alone
--cpus=2                 the CPUs of each host of a worker

A worker takes the resources of its hosts (--topology, --device, --hosts, --workers, --env) as one placement group, and
starts when all of them are free. One that was stopped or has lost its machine is started again without being counted,
and one that has failed up to --max_restarts times. Ctrl-C lets the cells save, and a second one kills the workers.
"""

import argparse
import dataclasses
import importlib.util
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from launch.engines import job as jobs
from launch.engines import local
from launch.engines.engine import Engine
from launch.engines.job import Job
from launch.engines.ray_worker import RayWorker, hosts
from launch.live_table import LiveTable
from lowrank.core.errors import UserError
from lowrank.core.paths import in_bucket
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.status import Status

POLL = 1.0  # seconds between two looks at the folder
# Of a cluster that lives on this machine as long as the command. Both are read when Ray is imported.
ALONE = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this engine."""
    parser.add_argument("--ray_address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cpus", type=int, default=1, help=argparse.SUPPRESS)


def read(args: argparse.Namespace) -> Job:
    """The job that the flags describe. Raises UserError for flags that do not fit."""
    job = jobs.read_job(args)
    jobs.refuse(job, "ray", image="", setup="", queue="", cluster="", project="", zone="", spot=False)
    if job.topology:
        jobs.refuse(job, "ray", hosts=1)
    if args.cpus < 0:
        raise UserError(f"--cpus={args.cpus} is not a number from 0 on")
    folder = job.folder if in_bucket(job.folder) else os.path.abspath(job.folder)
    return dataclasses.replace(job, folder=folder, command=(*job.command[:-1], folder))


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not fit, and if Ray is not installed."""
    read(args)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine=ray needs the package ray: pip install 'lowrank[ray]'")


def describe(args: argparse.Namespace) -> str:
    """What a worker takes."""
    job = read(args)
    group = [host.resources for host in hosts(job, args.cpus)]
    return f"\n{job.workers} x {job.worker_shell('NAME', '0' if len(group) > 1 else '')}\non {group}\n"


def run(study: StudyFolder, args: argparse.Namespace) -> int:
    """Runs the study to its end; returns 0 if every cell is done, 1 if some failed, 42 if it was stopped."""
    job, status = read(args), Status(study)
    mine = _connect(args.ray_address)
    workers = [RayWorker(job, i, args.cpus) for i in range(job.workers)]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    stopping = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping += 1
        for worker in workers:
            worker.stop(kill=stopping > 1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with LiveTable() as table:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(POLL)
                status.update()
                table.show(status)
                for worker in workers:
                    for line in worker.take_lines():
                        table.say(line)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if mine:
            _ray().shutdown()
    return local.finish(status, stopping > 0)


def _ray() -> Any:
    import ray

    return ray


def _connect(address: str) -> bool:
    """Joins the cluster at an address, or starts one on this machine; whether this command ends the connection."""
    if not address:
        os.environ.update(ALONE)
    ray = _ray()
    if ray.is_initialized():
        return False
    try:
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UserError(f"--ray_address={address}: {e}") from None
    return True


ENGINE = Engine(add_flags, check, run, describe)
