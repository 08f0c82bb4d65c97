"""`python -m launch.preflight`: what it prints, what it advises, and one line for bad input."""

import importlib.util
import json
import subprocess
import sys

import pytest

from launch import preflight as command
from lowrank.core.errors import UserError
from lowrank.memory import advice, compiled, devices, gpus, tpus
from lowrank.training import build
from tests.support.tiny_runs import config_of

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
CONFIG = "--config=configs/tiny.py"
COSTS = (
    "optim.accumulate",
    "logits_chunk_tokens",
    "model.remat",
    "optim.paged",
    "mesh.fsdp",
    "model.dtype",
    "model.param_dtype",
)
COSTS += ("method.rank",)


def words(files, *more):
    model, records = files / "llama", files / "records.jsonl"
    there = [f"--config.model.name={model}", f"--config.data.source=jsonl:{records}", "--config.mesh.data=1"]
    return [CONFIG, *there, *more]


@pytest.fixture(autouse=True)
def no_cuda_plugin(monkeypatch):
    """As where only a CPU's compiler is installed."""
    monkeypatch.setattr(gpus, "has_compiler", lambda: False)


@pytest.fixture
def no_compiler(monkeypatch):
    """The formula alone: the programs are not compiled."""
    none = compiled.Compiled("cpu", 0, 0, 0, 0, compiled.Program(temporary=1), None)
    monkeypatch.setattr(compiled, "compile_programs", lambda run, arrays: none)


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        (["--topology=v5e:4x5", CONFIG], "unknown topology 'v5e:4x5'"),
        (["--topology=v5e:4x5", CONFIG], "v5e:16x16, v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4"),
        (["--topology=v9:4x4", CONFIG], "known: tpu7x:2x2x1"),
        (["--topology=v5e:4x4,slices=0", CONFIG], "slices=N, N from 1 to 64"),
        (["--device=h10", CONFIG], "'h10' (did you mean 'h100'?)"),
        (["--device=h100:none", CONFIG], "an integer from 1 to 64"),
        (["--device=h100", "--topology=v5e:4x4", CONFIG], "give one"),
        ([], "--config=FILE.py is required"),
        (["--config=configs/tony.py"], "'configs/tony.py' cannot be read"),
        ([CONFIG, "--config.methd.rank=3"], "'config.methd.rank' (did you mean 'config.method'?)"),
        ([CONFIG, "--config.steps"], "not --config.KEY=VALUE"),
        ([CONFIG, "--config.data.source=jsonl:nowhere.jsonl"], "nowhere.jsonl"),
        (["--confg=x"], "--confg=x"),
        (["format", "1"], "'format' is not a command"),
        (["formats", "many"], "'many'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(given, culprit, capsys):
    assert command.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error


def test_a_topology_needs_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([CONFIG, "--topology=v5e:4x4"]) == 2
    assert "pip install 'lowrank[tpu]'" in capsys.readouterr().err


def test_a_topology_and_several_devices_get_a_process_of_their_own(monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", lambda words, env, check: calls.append((words, env)) or _Done())
    assert command.main([CONFIG, "--topology=v5e:4x4"]) == 0
    assert command.main([CONFIG, "--device=h100:4"]) == 0
    (slice_words, slice_env), (gpu_words, gpu_env) = calls
    assert slice_words[:3] == [sys.executable, "-m", "launch.preflight"]
    assert slice_words[-2:] == [CONFIG, "--topology=v5e:4x4"]
    assert slice_env["TPU_ACCELERATOR_TYPE"] == "v5litepod-16"
    assert (slice_env["TPU_SKIP_MDS_QUERY"], slice_env["JAX_PLATFORMS"]) == ("1", "cpu")
    assert gpu_env["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=4")
    assert gpu_words[3] == command.WORKER


class _Done:
    returncode = 0


def test_the_known_devices_and_slices():
    assert devices.parse_device("h100").memory == 80 * 2**30
    assert devices.parse_device("a100:8")[2] == 8
    assert devices.parse_topology("v5e:4x4")[1:3] == (16 * 2**30, 16)
    assert devices.parse_topology("v5p:2x2x1").num_devices == 4
    assert devices.parse_topology("v4:2x2x2")[1:3] == (16 * 2**30, 16)  # two devices a chip
    assert devices.parse_topology("v5e:16x16,slices=2")[2:] == (512, "v5e:16x16", 2)


def test_every_gpu_with_a_memory_can_be_described():
    assert set(gpus.GPUS) == set(devices.MEMORY) - {"v2", "v3", *tpus.TPUS}
    text = gpus.target_config(gpus.GPUS["h100"], 80 * 2**30)
    for field in ("core_count: 132 ", "major: 9 minor: 0", f"device_memory_size: {80 * 2**30} ", "H100 80GB"):
        assert field in text
    for gpu in gpus.GPUS.values():
        assert gpu.capability in gpus.LIMITS


def test_the_table_says_which_figure_is_which_and_that_it_fits(files, capsys):
    assert command.main(words(files, "--device=h100")) == 0
    out = capsys.readouterr().out
    assert "lora on" in out
    assert "formula / compiled" in out
    assert "compiled for cpu, as this machine lacks a h100" in out
    assert "fits: " in out
    (line,) = (line for line in out.splitlines() if line.startswith("weights"))
    assert line.endswith("1.00")


def test_json_holds_the_same(files, capsys, no_compiler):
    assert command.main(words(files, "--device=h100", "--json", "--config.optim.accumulate=2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["missing_bytes"] == 0
    assert found["memory_bytes"] == 80 * 2**30
    assert found["formula"]["gradients"] == 2 * found["formula"]["adapter"] > 0
    assert found["compiled"]["platform"] == "cpu"
    assert found["compiled"]["native"] is False
    assert found["flops"]["model"] > found["flops"]["recomputed"] > 0


@pytest.mark.parametrize("more", [[], ["--config.model.quantize=nf4"]])
def test_a_folder_with_a_config_alone_is_planned_as_the_model_itself(files, tmp_path, capsys, no_compiler, more):
    (tmp_path / "config.json").write_text((files / "llama" / "config.json").read_text())
    sums = []
    for folder, source in ((files / "llama", files / "records.jsonl"), (tmp_path, "nowhere.jsonl")):
        flags = [f"--config.model.name={folder}", f"--config.data.source=jsonl:{source}"]
        assert command.main(words(files, *flags, *more, "--device=h100", "--json")) == 0
        sums.append(json.loads(capsys.readouterr().out)["formula"])
    assert sums[0] == sums[1]
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        build.build_run(config_of(files, model__name=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ("objective=classification", "name the classes in data.labels"),
        ("data.seq_len=65", "data.seq_len=65 exceeds the model's 64 positions"),
        ("model.quantize=mixed", "has no model.safetensors"),
    ],
)
def test_what_a_config_alone_does_not_tell_is_said(files, tmp_path, capsys, change, culprit):
    (tmp_path / "config.json").write_text((files / "llama" / "config.json").read_text())
    assert command.main(words(files, f"--config.model.name={tmp_path}", f"--config.{change}")) == 2
    assert culprit in capsys.readouterr().err


def test_what_does_not_fit_is_told_by_how_much_and_what_to_change(files, capsys, monkeypatch, no_compiler):
    small = build.build_run(config_of(files, mesh__data=1, optim__accumulate=8))
    room = advice.formulas.estimate_memory(small).peak
    monkeypatch.setitem(devices.MEMORY, "h100", room / devices.GIB)
    assert command.main(words(files, "--device=h100", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["missing_bytes"] == found["needed_bytes"] - room > 0
    (step,) = found["advice"]
    assert step["option"]["changes"] == {"optim.accumulate": 8}
    assert step["leaves"] == room
    assert command.main(words(files, "--device=h100", "--formula")) == 1
    out = capsys.readouterr().out
    assert "not compiled" in out
    assert "does not fit: " in out
    assert "--config.optim.accumulate=8: saves " in out
    assert "together they fit" in out


def test_advice_goes_from_cheap_to_dear_and_adds_up(files):
    # Two rows allow two devices: with two rows of a kernel on each of eight, scales would take what codes save.
    options = {"mesh__data": 1, "model__remat": "none", "data__seq_len": 64, "data__batch_size": 2}
    run = build.build_run(config_of(files, "rank=4", **options))
    steps = advice.advise(run, memory=0)
    keys = [next((k for k in s.option.changes if k in COSTS), "model.quantize") for s in steps]
    order = [*COSTS, "model.quantize"]
    assert keys == sorted(keys, key=order.index)
    assert {"optim.accumulate", "model.remat", "mesh.fsdp", "method.rank", "model.quantize"} <= set(keys)
    left = [s.leaves_with_all_before for s in steps]
    assert left == sorted(left, reverse=True)
    assert all(s.saves > 0 for s in steps)
    remat = next(s for s in steps if "model.remat" in s.option.changes)
    block = build.build_run(config_of(files, "rank=4", **{**options, "model__remat": "full"}))
    assert remat.leaves == advice.formulas.estimate_memory(block).peak
    assert [s.option.changes for s in advice.advise(run, memory=left[0])] == [steps[0].option.changes]
