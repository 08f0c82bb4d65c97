"""The engine `jobset`: a JobSet of Kubernetes for each worker, on GKE's TPU node pools.

A pod that ends with code 42, or that is disrupted (preempted, evicted, drained), restarts its JobSet without being
counted; any other failure counts against `--max_restarts`. A JobSet has exclusive node pools: no other job gets a part
of its slice. Each worker is a JobSet of its own, as JobSet restarts all of its Jobs together.
"""

from pathlib import Path
from typing import Any

import yaml

from launch.engines import job as jobs
from launch.engines.cluster import cluster_engine
from launch.engines.job import RESTART, Job
from lowrank.memory import tpus

EXCLUSIVE = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
QUEUE = "kueue.x-k8s.io/queue-name"
CONTAINER = "worker"
SLICE = "SLICE_INDEX"  # the variable with the index of a pod's slice
GRACE = 30  # seconds from SIGTERM to SIGKILL


def files(job: Job) -> dict[str, str]:
    """One YAML file with a JobSet for each worker."""
    return {f"{job.name}.yaml": yaml.safe_dump_all([jobset(job, i) for i in range(job.workers)], sort_keys=False)}


def commands(job: Job, folder: Path) -> list[list[str]]:
    """The command that creates the JobSets."""
    return [["kubectl", "apply", f"--filename={folder / job.name}.yaml"]]


def jobset(job: Job, index: int) -> dict[str, Any]:
    """The JobSet of one worker."""
    restart = {
        "name": "stoppedOrPreempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.worker_name(index),
            "annotations": EXCLUSIVE,
            **({"labels": {QUEUE: job.queue}} if job.queue else {}),
        },
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [restart]},
            "replicatedJobs": [
                {"name": "slice", "replicas": job.slices, "template": {"spec": slice_job(job, job.worker_name(index))}}
            ],
        },
    }


def slice_job(job: Job, worker: str) -> dict[str, Any]:
    """The specification of the Job (batch/v1) of one slice: a pod on each of its hosts."""
    hosts = tpus.hosts(job.topology)
    stopped = {"containerName": CONTAINER, "operator": "In", "values": [RESTART]}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": stopped},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(job, worker)},
    }


def _pod(job: Job, worker: str) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.tpu.gke,
        "cloud.google.com/gke-tpu-topology": job.topology.partition(":")[2],
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    network = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if job.slices > 1 else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        **network,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job, worker)],
    }


def _container(job: Job, worker: str) -> dict[str, Any]:
    hosts = tpus.hosts(job.topology)
    index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
    process = f"$(({SLICE} * {hosts} + ${{TPU_WORKER_ID:-$JOB_COMPLETION_INDEX}}))" if hosts * job.slices > 1 else ""
    chips = tpus.chips(job.topology) // hosts
    return {
        "name": CONTAINER,
        "image": job.image,
        "command": ["bash", "-c", f"exec {job.worker_shell(worker, process)}"],
        "env": [
            {"name": SLICE, "valueFrom": index},
            *({"name": name, "value": value} for name, value in job.environment.items()),
        ],
        "ports": [{"containerPort": port} for port in (8471, 8080)],  # of TPU processes, and of a run's coordinator
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
    }


def check(job: Job) -> None:
    """Raises UserError for a job that needs more than Kubernetes can give it."""
    jobs.require(job, "jobset", topology="v5e:4x4", image="REGISTRY/NAME")
    jobs.require_bucket(job, "jobset")
    jobs.refuse(job, "jobset", device="", hosts=1, setup="", cluster="", project="", zone="")


INSTALL = "see https://kubernetes.io/docs/tasks/tools, and for a cluster https://jobset.sigs.k8s.io/docs/installation"
ENGINE = cluster_engine("kubectl", INSTALL, files, commands, check)
