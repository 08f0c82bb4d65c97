"""The engine `tpu_vm`: a queued resource of Cloud TPU for each worker, whose hosts are started by ssh.

The command stays until the workers end, and deletes their TPUs whatever happens, also after Ctrl-C. A TPU that was
preempted is deleted and asked for again without being counted, a worker that ends with code 42 is started again on its
host, and other failures are tried again up to `--max_restarts` times. The API serves no TPU7x.
"""

import shlex
from pathlib import Path

from launch.engines import job as jobs
from launch.engines.cluster import cluster_engine
from launch.engines.job import PYTHON, RESTART, SETUP, Job
from lowrank.core.errors import UserError
from lowrank.memory import tpus

RUNTIMES = {  # the software of a new machine
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes"
HOST_INDEX = f"$(curl -sfH Metadata-Flavor:Google {METADATA}/agent-worker-number)"  # in the slice
UNPACK = "mkdir -p lowrank && tar -xzf lowrank.tar.gz -C lowrank && cd lowrank"

SCRIPT = r"""#!/usr/bin/env bash
# Runs one worker of the study: bash {name}.sh INDEX
set -u
name={name}-"$1"
nodes=({nodes})
at=({at})
failures=0
scratch="$(mktemp -d)"

state() {{ gcloud compute tpus queued-resources describe "$name" "${{at[@]}}" --format='value(state.state)'; }}
delete() {{ gcloud compute tpus queued-resources delete "$name" "${{at[@]}}" --force --quiet; }}
trap 'trap "" INT TERM; rm -r "$scratch"; delete' EXIT
trap 'exit 42' INT TERM

create() {{
    gcloud compute tpus queued-resources create "$name" {create} "${{at[@]}}" || exit 1
    while true; do
        case "$(state)" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED) return 1 ;;
        esac
        sleep "${{POLL_SECONDS:-30}}"
    done
}}

on_hosts() {{  # the same command on all hosts of all slices; fails if one does
    local pids=() code=0 i
    for i in "${{!nodes[@]}}"; do
        gcloud compute tpus tpu-vm ssh "${{nodes[$i]}}" "${{at[@]}}" --worker=all --command="slice=$i; $1" &
        pids+=("$!")
    done
    for i in "${{pids[@]}}"; do wait "$i" || code=$?; done
    return "$code"
}}

prepare() {{  # copies the files of this folder that git does not ignore, and installs them
    local node code="$scratch/lowrank.tar.gz"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$code" || return 1
    for node in "${{nodes[@]}}"; do
        gcloud compute tpus tpu-vm scp "$code" "$node": "${{at[@]}}" --worker=all --quiet || return 1
    done
    on_hosts {setup}
}}

while true; do
    if create; then
        prepare && on_hosts {worker}
        code=$?
        [ "$code" -eq 0 ] && exit 0
        if [ "$(state)" = ACTIVE ]; then
            failures=$((failures + 1))
            [ "$failures" -gt {max_restarts} ] && exit "$code"
        fi
    fi
    delete
done
"""


def files(job: Job) -> dict[str, str]:
    """The script that starts a worker and watches it."""
    several = job.slices > 1
    create = {
        "accelerator-type": tpus.accelerator_type(job.topology),
        "runtime-version": RUNTIMES[job.topology.partition(":")[0]],
        **({"node-count": job.slices, "node-prefix": '"$name"'} if several else {"node-id": '"$name"'}),
    }
    flags = [f"--{flag}={value}" for flag, value in create.items()] + ["--spot"] * job.spot
    at = {"zone": job.zone, "project": job.project}
    text = SCRIPT.format(
        name=job.name,
        nodes=" ".join(f'"$name-{i}"' for i in range(job.slices)) if several else '"$name"',
        at=" ".join(f"--{flag}={shlex.quote(value)}" for flag, value in at.items() if value),
        create=" ".join(flags),
        setup=shlex.quote(f"{UNPACK} && {job.setup or SETUP.format(extras='gcs,tpu')}"),
        worker=_worker(job),
        max_restarts=job.max_restarts,
    )
    return {f"{job.name}.sh": text}


def _worker(job: Job) -> str:
    """The worker on a host, started again after code 42, as an argument of the script's `on_hosts`.

    The name of the worker is filled in by the script, the rest by the host.
    """
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in job.environment.items())
    process = f"$((slice * {tpus.hosts(job.topology)} + {HOST_INDEX}))"
    loop = f'while :; do {job.worker_shell("NAME", process)}; code=$?; [ "$code" = {RESTART} ] || exit "$code"; done'
    before, after = f"cd lowrank; {exports}{loop}".split('"NAME"')
    return f'{shlex.quote(before)}"$name"{shlex.quote(after)}'


def commands(job: Job, folder: Path) -> list[list[str]]:
    """A script's run for each worker."""
    return [["bash", str(folder / f"{job.name}.sh"), str(i)] for i in range(job.workers)]


def check(job: Job) -> None:
    """Raises UserError for a job that the Cloud TPU API cannot start."""
    jobs.require(job, "tpu_vm", topology="v5e:4x4", zone="ZONE")
    jobs.require_bucket(job, "tpu_vm")
    jobs.refuse(job, "tpu_vm", device="", hosts=1, image="", queue="", cluster="")
    check_generation(job, "tpu_vm")


def check_generation(job: Job, engine: str) -> None:
    """Raises UserError for a generation of TPUs that the Cloud TPU API does not serve."""
    kind = job.topology.partition(":")[0]
    if kind not in RUNTIMES:
        raise UserError(
            f"--engine={engine} starts TPUs by the Cloud TPU API, which serves {', '.join(RUNTIMES)} and not {kind}: "
            "use --engine=jobset or --engine=xpk"
        )


INSTALL = "see https://cloud.google.com/sdk/docs/install"
ENGINE = cluster_engine("gcloud", INSTALL, files, commands, check, python=PYTHON)
