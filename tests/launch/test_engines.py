"""The engines of a cluster: what their job files and commands say, and which jobs they refuse."""

import os
import re
from pathlib import Path

import pytest
import yaml

from launch import sweep
from launch.engines import ENGINES
from lowrank.core.errors import UserError
from lowrank.memory import tpus
from tests.support.job_files import FOLDER, calls, describe, fake_tools, files, run_script

ROOT = Path(__file__).parents[2]
WORKER = f"python -m launch.worker {FOLDER}"
POD = ("--topology=v5e:4x4", "--image=registry/lowrank")
VM = ("--topology=v5e:4x4", "--zone=us-west4-a")


def jobsets(*flags):
    texts, _ = files(describe("jobset", *POD, *flags))
    return list(yaml.safe_load_all(texts["ranks-of-lora.yaml"]))


def test_slices_have_the_types_and_hosts_that_their_vendor_gives_them():
    # as xpk 1.16 writes them into its manifests
    known = {
        "v5e:2x4": ("v5litepod-8", 2),
        "v5e:4x4": ("v5litepod-16", 4),
        "v5e:16x16": ("v5litepod-256", 64),
        "v6e:1x1": ("v6e-1", 1),
        "v6e:8x8": ("v6e-64", 16),
        "v5p:2x2x1": ("v5p-8", 1),
        "v5p:4x4x4": ("v5p-128", 16),
        "v4:2x2x2": ("v4-16", 2),
        "tpu7x:2x2x2": ("tpu7x-16", 2),
    }
    assert {name: (tpus.accelerator_type(name), tpus.hosts(name)) for name in known} == known


def test_a_worker_is_a_jobset_with_a_pod_on_each_host_of_its_slices():
    first, second = jobsets("--workers=2", "--topology=v5e:4x4,slices=2", "--queue=tpus", "--env=LEVEL=3")
    assert (first["apiVersion"], first["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert [each["metadata"]["name"] for each in (first, second)] == ["ranks-of-lora-0", "ranks-of-lora-1"]
    assert first["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert first["metadata"]["annotations"] == exclusive
    [slices] = first["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["restartPolicy"] == "Never"
    assert pod["hostNetwork"] is True
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == "registry/lowrank"
    assert {"name": "LEVEL", "value": "3"} in container["env"]
    index = '--process="$((SLICE_INDEX * 4 + ${TPU_WORKER_ID:-$JOB_COMPLETION_INDEX}))"'
    assert container["command"] == ["bash", "-c", f'exec {WORKER} --group="ranks-of-lora-0" {index}']


def test_preempted_and_stopped_pods_restart_a_jobset_apart_from_failures():
    [jobset] = jobsets("--max_restarts=5")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    [rule] = policy["rules"]  # what no rule matches restarts the JobSet, and is counted
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    rules = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]
    assert rules[0]["onExitCodes"] == {"containerName": "worker", "operator": "In", "values": [42]}
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_a_worker_on_one_host_is_one_process_without_a_group():
    [jobset] = jobsets("--topology=v5p:2x2x1")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["bash", "-c", f"exec {WORKER}"]
    assert "hostNetwork" not in pod


def test_spot_pods_go_to_spot_nodes():
    [jobset] = jobsets("--spot")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [toleration["key"] for toleration in pod["tolerations"]]


def test_xpk_gets_a_workload_for_each_worker():
    flags = ("--topology=v5p:2x2x2,slices=2", "--image=i", "--cluster=c", "--project=p", "--zone=z", "--env=A=x y")
    texts, commands = files(describe("xpk", *flags, "--workers=2", "--spot"))
    assert not texts
    assert [words[3] for words in commands] == ["--workload=ranks-of-lora-0", "--workload=ranks-of-lora-1"]
    assert {"--tpu-type=v5p-16", "--num-slices=2", "--restart-on-exit-codes=42", "--env=A=x y"} <= set(commands[0])
    assert {"--spot", "--cluster=c", "--project=p", "--zone=z", "--docker-image=i"} <= set(commands[0])
    [script] = [word for word in commands[0] if word.startswith("--command=")]
    process = '--process="$((${MEGASCALE_SLICE_ID:-0} * 2 + TPU_WORKER_ID))"'
    assert script == f'--command=exec {WORKER} --group="ranks-of-lora-0" {process}'


def test_slurm_gets_an_array_whose_flags_all_have_values():
    texts, commands = files(describe("slurm", "--device=h100:8", "--workers=4", "--queue=gpu", "--env=A=it's"))
    text = texts["ranks-of-lora.sh"]
    options = re.findall(r"^#SBATCH --(\S+)$", text, flags=re.MULTILINE)
    assert not [option for option in options if option.endswith(("=", "=''"))]
    assert {"array=0-3", "nodes=1", "ntasks-per-node=1", "gpus-per-node=h100:8", "partition=gpu"} <= set(options)
    assert {"requeue", "signal=TERM@120", "open-mode=append"} <= set(options)
    assert f"srun --kill-on-bad-exit=1 bash -c 'exec {WORKER}'\n" in text
    assert commands == [["sbatch", "jobs/ranks-of-lora/ranks-of-lora.sh"]]
    texts, _ = files(describe("slurm", "--device=h100:8", "--hosts=2"))
    assert "--ntasks-per-node=8\n" in texts["ranks-of-lora.sh"]
    assert '--group="ranks-of-lora-$SLURM_ARRAY_TASK_ID" --process="$SLURM_PROCID"' in texts["ranks-of-lora.sh"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (42, True), (1, False)])
def test_a_slurm_script_asks_for_another_turn_after_a_stop_alone(code, requeued, tmp_path):
    texts, _ = files(describe("slurm"))
    tools = fake_tools(tmp_path, srun=f"exit {code}", scontrol="exit 0")
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert run_script(texts["ranks-of-lora.sh"], tools, **variables) == code
    assert (calls(tmp_path, "scontrol") == [["scontrol", "requeue", "7_2"]]) is requeued


def test_skypilot_gets_a_task_for_each_worker():
    texts, commands = files(describe("skypilot", "--topology=v5e:4x4", "--zone=us-west4-a", "--spot", "--workers=2"))
    assert list(texts) == ["ranks-of-lora-0.yaml", "ranks-of-lora-1.yaml"]
    assert [words[:3] for words in commands] == [["sky", "jobs", "launch"]] * 2
    task = yaml.safe_load(texts["ranks-of-lora-1.yaml"])
    resources = task["resources"]
    assert (resources["infra"], resources["accelerators"]) == ("gcp/us-west4/us-west4-a", "tpu-v5litepod-16")
    assert resources["use_spot"] is True
    assert resources["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [42]}
    assert f'.venv/bin/{WORKER} --group="ranks-of-lora-1" --process=' in task["run"]
    gpus = yaml.safe_load(files(describe("skypilot", "--device=h100:8", "--hosts=2"))[0]["ranks-of-lora-0.yaml"])
    assert (gpus["resources"]["accelerators"], gpus["num_nodes"]) == ("H100:8", 2)
    assert 'JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"' in gpus["run"]


# The states that the API reports one after another, the codes of the ssh commands, the script's code, and how often a
# TPU is created: a run that is done; a preempted TPU; a TPU that is not given; failures on a TPU that is there.
@pytest.mark.parametrize(
    ("states", "codes", "end", "created"),
    [
        ("CREATING ACTIVE", "0 0", 0, 1),
        ("ACTIVE SUSPENDED ACTIVE", "0 255 0 0", 0, 2),
        ("FAILED ACTIVE", "0 0", 0, 2),
        ("ACTIVE ACTIVE ACTIVE ACTIVE", "0 1 0 1", 1, 2),
    ],
)
def test_a_tpu_vm_is_watched_to_the_end_and_always_deleted(states, codes, end, created, tmp_path):
    texts, commands = files(describe("tpu_vm", *VM, "--max_restarts=1", "--project=p"))
    assert commands == [["bash", "jobs/ranks-of-lora/ranks-of-lora.sh", "0"]]
    (tmp_path / "states").write_text("\n".join(states.split()))
    (tmp_path / "codes").write_text("\n".join(codes.split()))
    take = f'take() {{ head -n1 "{tmp_path}/$1"; sed -i 1d "{tmp_path}/$1"; }}; '
    script = f'{take} case "$3.$4" in *.describe) take states ;; tpu-vm.ssh) exit "$(take codes)" ;; esac'
    tools = fake_tools(tmp_path, gcloud=script)
    assert run_script(texts["ranks-of-lora.sh"], tools, "0", POLL_SECONDS="0.01") == end
    gcloud = ("gcloud", "compute", "tpus")
    creations = calls(tmp_path, *gcloud, "queued-resources", "create")
    assert len(creations) == created
    assert {"ranks-of-lora-0", "--node-id=ranks-of-lora-0", "--accelerator-type=v5litepod-16"} <= set(creations[0])
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--zone=us-west4-a", "--project=p"} <= set(creations[0])
    assert calls(tmp_path)[-1][:5] == [*gcloud, "queued-resources", "delete"]
    assert len(calls(tmp_path, *gcloud, "queued-resources", "delete")) == created
    worker = calls(tmp_path, *gcloud, "tpu-vm", "ssh")[-1]
    assert "--worker=all" in worker
    assert f".venv/bin/{WORKER} --group=ranks-of-lora-0 --process=" in worker[-1]


def test_each_slice_of_a_worker_is_a_node_of_its_queued_resource():
    texts, _ = files(describe("tpu_vm", "--topology=v5e:4x4,slices=2", "--zone=z"))
    assert 'nodes=("$name-0" "$name-1")' in texts["ranks-of-lora.sh"]
    assert '--node-count=2 --node-prefix="$name"' in texts["ranks-of-lora.sh"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("jobset --image=i", "needs --topology=v5e:4x4"),
        ("jobset --topology=v5e:4x4", "needs --image="),
        ("jobset --topology=v5e:4x5 --image=i", "did you mean 'v5e:4x"),
        ("jobset --topology=v5e:4x4 --image=i --folder=runs/a", "gs://BUCKET/FOLDER"),
        ("jobset --topology=v5e:4x4 --image=i --name=Upper", "--name=Upper"),
        ("jobset --topology=v5e:4x4 --image=i --env=A", "--env=A"),
        ("jobset --topology=v5e:4x4 --image=i --zone=z", "cannot heed --zone=z"),
        ("jobset --topology=v5e:4x4 --image=i --workers=-1", "--workers=-1"),
        ("xpk --topology=v5e:2x2 --image=i --cluster=c", "v5e:2x4"),
        ("xpk --topology=v5e:4x4 --image=i", "needs --cluster="),
        ("slurm --topology=v5e:4x4", "cannot heed --topology"),
        ("slurm --hosts=0", "--hosts=0"),
        ("skypilot --topology=v5e:4x4,slices=2", "cannot heed --slices=2"),
        ("skypilot --topology=tpu7x:2x2x1", "not tpu7x"),
        ("tpu_vm --topology=tpu7x:2x2x1 --zone=z", "not tpu7x"),
        ("tpu_vm --topology=v5e:4x4", "needs --zone="),
        ("jobsets", "did you mean 'jobset'"),
    ],
)
def test_a_job_that_an_engine_cannot_start_is_one_line(flags, words):
    engine, *rest = flags.split()
    with pytest.raises(UserError, match=re.escape(words)) as error:
        describe(engine, *rest)
    assert "\n" not in str(error.value)


def test_a_missing_tool_is_one_line_that_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    args, _ = sweep.parse(["--study=s.py", f"--folder={FOLDER}", "--engine=xpk", "--cluster=c", *POD])
    with pytest.raises(UserError, match="runs xpk, which is not installed: pip install xpk"):
        ENGINES["xpk"].check(args)


def test_a_cluster_gets_the_files_and_the_command_once_the_cells_are_checked(tmp_path, request, monkeypatch):
    models = request.getfixturevalue("files")  # whose name is that of a function here
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{fake_tools(tmp_path, sbatch='exit 3')}:{os.environ['PATH']}")
    words = [f"--study={ROOT / 'configs/sweeps/lora_rank.py'}:tiny", "--folder=runs/ranks", "--engine=slurm"]
    words += [f"--config.model.name={models / 'llama'}"]
    words += [f"--config.data.source=jsonl:{models / 'records.jsonl'}"]
    assert sweep.main([*words, "--config.steps=-1"]) == 2
    assert not calls(tmp_path)
    assert sweep.main(words) == 3  # the code of the tool
    assert calls(tmp_path) == [["sbatch", "jobs/ranks/ranks.sh"]]
    assert "launch.worker runs/ranks" in (tmp_path / "jobs/ranks/ranks.sh").read_text()
    assert (tmp_path / "runs/ranks/study.json").exists()
