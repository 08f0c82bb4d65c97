"""The engine `ray` on a cluster of Ray that really runs, on one machine."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.engines.job import Job
from launch.engines.ray import ALONE
from launch.engines.ray_worker import RayWorker

os.environ.update(ALONE)
import ray  # after the variables that it reads

SECONDS = 120
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray, about itself

# Notes its arguments and what Ray has given it. It then waits for SIGTERM, or ends with the code of this start.
SCRIPT = """
import json, os, pathlib, signal, sys, time
folder, codes, *rest = sys.argv[1:]
facts = {"rest": rest, "pid": os.getpid(), "TPU": os.environ.get("TPU_VISIBLE_CHIPS"), "LEVEL": os.environ.get("LEVEL")}
facts |= {name: os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID", "COORDINATOR_ADDRESS")}
starts = pathlib.Path(folder) / "starts"
with open(starts, "a") as file:
    file.write(json.dumps(facts) + chr(10))
count = len(starts.read_text().splitlines())
code = codes.split(",")[min(count, len(codes.split(","))) - 1]
print(f"start {count} ends with {code}", flush=True)
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    time.sleep(100)
sys.exit(int(code))
"""


@pytest.fixture(scope="module")
def pod():
    """A cluster of two hosts that say that they are a TPU slice, the second host first."""
    from ray.cluster_utils import Cluster

    os.environ["TPU_NAME"] = "slice-a"  # as on a TPU VM, where Ray reads it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    labels = {"ray.io/tpu-slice-name": "slice-a", "ray.io/tpu-topology": "2x4", "ray.io/tpu-pod-type": "v5litepod-8"}
    for index in (1, 0):
        head = {"TPU-v5litepod-8-head": 1} if index == 0 else {}
        node = {"resources": {"TPU": 4, **head}, "labels": {**labels, "ray.io/tpu-worker-id": str(index)}}
        cluster.add_node(num_cpus=2, **node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()
    del os.environ["TPU_NAME"]


def starts(folder):
    path = folder / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_worker(folder, codes, cpus=1, **fields):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return RayWorker(Job("ranks", str(folder), ("python", str(script), str(folder), codes), **fields), 0, cpus)


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_worker_is_started_again_after_a_stop_alone_and_a_failure_is_counted(pod, tmp_path):
    worker = make_worker(tmp_path, "42,42,1,42,1,0", max_restarts=1, topology="v5e:2x2", environment={"LEVEL": "3"})
    worker.run()
    assert len(starts(tmp_path)) == 5
    *_, last = worker.take_lines()
    assert (
        last
        == "error: ranks-0 has failed 2 times and is given up: process 0 ended with exit code 1: start 5 ends with 1"
    )
    assert {start["LEVEL"] for start in starts(tmp_path)} == {"3"}
    assert {len(start["TPU"].split(",")) for start in starts(tmp_path)} == {4}


def test_a_worker_that_is_asked_to_stop_saves_and_is_not_started_again(pod, tmp_path):
    worker = make_worker(tmp_path, "wait")
    thread = threading.Thread(target=worker.run)
    thread.start()
    wait_for(lambda: starts(tmp_path))
    worker.stop()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(starts(tmp_path)) == 1


def test_a_worker_whose_machine_is_lost_is_started_again(pod, tmp_path):
    worker = make_worker(tmp_path, "wait,0", max_restarts=0)
    thread = threading.Thread(target=worker.run)
    thread.start()
    wait_for(lambda: starts(tmp_path))
    parents = subprocess.run(["ps", "-o", "ppid=", str(starts(tmp_path)[0]["pid"])], capture_output=True, text=True)
    os.kill(int(parents.stdout), 9)  # the actor
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(starts(tmp_path)) == 2
    assert any("is started again: a host was lost" in line for line in worker.take_lines())


def test_a_worker_waits_for_its_resources_and_can_be_stopped_before(pod, tmp_path):
    worker = make_worker(tmp_path, "0", cpus=64)
    thread = threading.Thread(target=worker.run)
    thread.start()
    time.sleep(2)
    worker.stop()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert not starts(tmp_path)


def test_a_worker_is_a_process_on_each_host_of_a_slice(pod, tmp_path):
    worker = make_worker(tmp_path, "0", topology="v5e:2x4")
    worker.run()
    assert sorted(start["rest"] for start in starts(tmp_path)) == [
        ["--group=ranks-0", "--process=0"],
        ["--group=ranks-0", "--process=1"],
    ]
    assert {len(start["TPU"].split(",")) for start in starts(tmp_path)} == {4}
    [line] = worker.take_lines()
    assert line.startswith("ranks-0 runs; its log is ")


def test_hosts_that_jax_does_not_find_get_the_address_of_the_first(pod, tmp_path):
    make_worker(tmp_path, "0", hosts=2).run()
    found = starts(tmp_path)
    assert {start["NUM_PROCESSES"] for start in found} == {"2"}
    assert {start["PROCESS_ID"] for start in found} == {"0", "1"}
    assert len({start["COORDINATOR_ADDRESS"] for start in found}) == 1


STUDY = """
from configs import tiny
from lowrank.sweeps.axes import seeds
from lowrank.sweeps.study import Study

def get_study(arg=None):
    return Study("seeds", tiny.get_config(), seeds(2))
"""


def test_a_study_runs_on_ray_to_its_end(tmp_path, files):
    (tmp_path / "study.py").write_text(STUDY)
    words = [sys.executable, "-m", "launch.sweep", f"--study={tmp_path / 'study.py'}", f"--folder={tmp_path / 'runs'}"]
    words += [
        "--engine=ray",
        "--workers=2",
        f"--config.model.name={files / 'llama'}",
        "--config.steps=2",
        "--config.optim.warmup=0",
    ]
    words += [f"--config.data.source=jsonl:{files / 'records.jsonl'}"]
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(words, env=environment, timeout=500, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs" / "runs").glob("*/summary.json"))) == 2
