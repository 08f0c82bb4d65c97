"""The job files of the engines in their tools: xpk, the schema of Kubernetes, SkyPilot, gcloud and Slurm."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from launch import sweep
from launch.engines import ENGINES
from lowrank.memory import tpus
from tests.support.job_files import calls, describe, fake_tools, files, run_script

BIN = Path(os.environ.get("LAUNCHERS", Path(__file__).parents[2] / ".venv" / "launchers")) / "bin"
SKYPILOT = Path(os.environ.get("SKYPILOT", Path(__file__).parents[2] / ".venv" / "skypilot")) / "bin"
NAME = "ranks-of-lora"
SECONDS = 120


def run(words, folder, **variables):
    """A tool's output; its home is `folder`."""
    environment = {**os.environ, "HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    done = subprocess.run(words, env=environment, cwd=folder, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("topology", ["v5e:4x4,slices=2", "v5p:2x2x2", "v6e:2x4"])
def test_xpk_makes_the_manifest_of_a_workload_that_jobset_describes(topology, tmp_path):
    flags = (f"--topology={topology}", "--image=registry/lowrank", "--env=NOTE=a b")
    _, [words] = files(describe("xpk", *flags, "--cluster=c", "--project=p", "--zone=us-west4-a", "--spot"))
    manifest = tmp_path / "manifest.yaml"
    run([*words, "--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"], tmp_path)
    theirs = yaml.safe_load(manifest.read_text())
    texts, _ = files(describe("jobset", *flags))
    ours = yaml.safe_load(texts[f"{NAME}.yaml"])
    assert theirs["metadata"]["name"] == ours["metadata"]["name"] == f"{NAME}-0"
    assert theirs["metadata"]["annotations"] == ours["metadata"]["annotations"]  # exclusive topology
    [their_slice], [our_slice] = theirs["spec"]["replicatedJobs"], ours["spec"]["replicatedJobs"]
    assert their_slice["replicas"] == our_slice["replicas"]
    their_job, our_job = their_slice["template"]["spec"], our_slice["template"]["spec"]
    for key in ("parallelism", "completions", "backoffLimit"):
        assert their_job[key] == our_job[key], key
    assert 42 in their_job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    their_pod, our_pod = their_job["template"]["spec"], our_job["template"]["spec"]
    assert {key: value for key, value in their_pod["nodeSelector"].items() if "tpu" in key} == our_pod["nodeSelector"]
    [their_container], [our_container] = their_pod["containers"], our_pod["containers"]
    assert their_container["resources"]["limits"] == our_container["resources"]["limits"]
    assert their_container["image"] == our_container["image"]
    assert {"name": "NOTE", "value": "a b"} in their_container["env"]
    [script] = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    assert f"({script})" in their_container["command"][-1]


def test_slices_are_as_xpk_counts_them(tmp_path):
    code = (
        "import json; from xpk.core import system_characteristics as s; "
        "known = s.UserFacingNameToSystemCharacteristics; "
        "print(json.dumps({k: [v.topology, v.vms_per_slice, v.gke_accelerator] for k, v in known.items()}))"
    )
    known = json.loads(run([BIN / "python", "-W", "ignore", "-c", code], tmp_path).splitlines()[-1])
    slices = [f"{kind}:{layout}" for kind, tpu in tpus.TPUS.items() for layout in tpu.layouts]
    unknown = [name for name in slices if tpus.accelerator_type(name) not in known]
    assert unknown == ["v5e:1x1", "v5e:2x2"]
    for name in sorted(set(slices) - set(unknown)):
        kind, _, layout = name.partition(":")
        assert known[tpus.accelerator_type(name)] == [layout, tpus.hosts(name), tpus.TPUS[kind].gke], name


@pytest.mark.parametrize("flags", [(), ("--topology=v5e:4x4,slices=2", "--spot", "--env=LEVEL=3")])
def test_the_schema_of_kubernetes_takes_the_job_of_a_jobset(flags, tmp_path):
    texts, _ = files(describe("jobset", "--topology=v5p:2x2x1", "--image=i", *flags))
    job = yaml.safe_load(texts[f"{NAME}.yaml"])["spec"]["replicatedJobs"][0]["template"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME}, **job}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(whole))
    run(["kubernetes-validate", "--strict", path], tmp_path)
    job["spec"]["parallelisms"] = job["spec"].pop("parallelism")
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(AssertionError, match="parallelisms"):
        run(["kubernetes-validate", "--strict", path], tmp_path)


@pytest.mark.parametrize("flags", [("--topology=v6e:4x4", "--zone=us-west4-a", "--spot"), ("--device=h100:8",)])
def test_skypilot_reads_the_task_of_a_worker(flags, tmp_path):
    texts, _ = files(describe("skypilot", *flags, "--env=LEVEL=3"))
    (tmp_path / "task.yaml").write_text(texts[f"{NAME}-0.yaml"])
    code = (
        "import json, sky; task = sky.Task.from_yaml('task.yaml'); [found] = task.resources; "
        "print(json.dumps([task.name, found.accelerators, found.use_spot, found.job_recovery]))"
    )
    name, accelerators, spot, recovery = json.loads(run([SKYPILOT / "python", "-c", code], tmp_path).splitlines()[-1])
    assert name == f"{NAME}-0"
    assert accelerators == ({"tpu-v6e-16": 1} if "--spot" in flags else {"H100": 8})
    assert spot is ("--spot" in flags)
    assert recovery["max_restarts_on_errors"] == 3
    assert recovery["recover_on_exit_codes"] == [42]


# Of `gcloud compute tpus queued-resources create|describe|delete` and `gcloud compute tpus tpu-vm scp|ssh`.
DOCUMENTED = (
    "--accelerator-type --async --best-effort --command --force --format --guaranteed --internal-ips "
    "--labels --metadata --metadata-from-file --network --node-count --node-id --node-prefix --project "
    "--quiet --recurse --runtime-version --service-account --spot --strict-host-key-checking --subnetwork "
    "--tunnel-through-iap --valid-until-duration --worker --zone"
)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:2x4,slices=2"])
def test_gcloud_parses_every_command_of_a_tpu_vm(topology, tmp_path):
    """By gcloud's own linter where it is installed, which no package index has, else by the flags it documents."""
    flags = (f"--topology={topology}", "--zone=us-west4-a", "--project=p", "--env=NOTE=a b", "--spot")
    texts, _ = files(describe("tpu_vm", *flags))
    tools = fake_tools(tmp_path, gcloud='[ "$4" = describe ] && echo ACTIVE; exit 0')
    assert run_script(texts[f"{NAME}.sh"], tools, "0") == 0
    commands = calls(tmp_path, "gcloud")
    assert {words[4] for words in commands} == {"create", "describe", "scp", "ssh", "delete"}
    if not shutil.which("gcloud"):
        given = {word.partition("=")[0] for words in commands for word in words if word.startswith("--")}
        assert given <= set(DOCUMENTED.split())
        return
    strings = list(dict.fromkeys(shlex.join(words) for words in [*commands, [*commands[0], "--sport"]]))
    path = tmp_path / "commands.json"
    path.write_text(json.dumps([{"command_string": string} for string in strings]))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={path}"]
    found = json.loads(run(lint, tmp_path, CLOUDSDK_CONFIG=str(tmp_path / "gcloud")))
    *errors, wrong = [line["error_message"] for line in found]
    assert errors == [None] * (len(strings) - 1)
    assert "--sport" in wrong


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of Slurm on this machine, with a folder of commands that its jobs find first."""
    host, folder = socket.gethostname().partition(".")[0], tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        **dict(zip(("SlurmctldPort", "SlurmdPort"), ports, strict=True)),
        **{"AuthType": "auth/none", "AuthInfo": "cred_expire=5", "CredType": "cred/none"},
        **{"SlurmUser": "root", "SlurmdUser": "root", "ReturnToService": "2", "MpiDefault": "none"},
        **{"ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none", "SwitchType": "switch/none"},
        **{"SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core"},
        **{"StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool"},
        **{"SlurmctldPidFile": folder / "slurmctld.pid", "SlurmdPidFile": folder / "slurmd.pid"},
    }
    nodes = f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN\n"
    nodes += "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    config = folder / "slurm.conf"
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()) + nodes)
    monkeypatch.setenv("SLURM_CONF", str(config))
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            log = open(folder / f"{name}.txt", "w")  # noqa: SIM115
            daemons.append(subprocess.Popen([name, "-D"], stdout=log, stderr=log))
            log.close()
        wait_for(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout)
        yield tmp_path
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(SECONDS)


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_slurm_runs_the_array_and_queues_a_stopped_worker_again(slurm, monkeypatch):
    monkeypatch.chdir(slurm)
    # The second worker is stopped once; the code of a worker is that of its task.
    stop = 'if [ "$SLURM_ARRAY_TASK_ID" = 1 ] && [ -z "$SLURM_RESTART_COUNT" ]; then exit 42; fi; exit 0'
    monkeypatch.setenv("PATH", f"{fake_tools(slurm, python=stop)}:{os.environ['PATH']}")
    args, _ = sweep.parse(["--study=s.py", "--folder=gs://bucket/ranks", "--engine=slurm", "--workers=2"])
    assert ENGINES["slurm"].check(args) is None
    texts, _ = files(ENGINES["slurm"].describe(args))
    Path("job.sh").write_text(texts["ranks.sh"])
    job = subprocess.run(["sbatch", "--parsable", "job.sh"], check=True, capture_output=True, text=True).stdout.strip()
    wait_for(lambda: len(calls(slurm, "python")) == 2)
    wait_for(lambda: "BeginTime" in subprocess.run(["squeue"], capture_output=True, text=True).stdout)
    subprocess.run(["scontrol", "update", f"JobId={job}_1", "StartTime=now"], check=True)  # not after its delay
    wait_for(lambda: len(calls(slurm, "python")) == 3)
    assert calls(slurm, "python") == [["python", "-m", "launch.worker", "gs://bucket/ranks"]] * 3

    def states():
        show = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
        words = show.split()
        return sorted(word for word in words if word.startswith(("JobState=", "Restarts=")))

    wait_for(lambda: states() == ["JobState=COMPLETED", "JobState=COMPLETED", "Restarts=0", "Restarts=1"])
