"""`python -m launch.advise`: values that build a run, whether it fits, and one line for bad input."""

import shlex

import pytest

from launch import advise, preflight
from lowrank.data.examples import Examples
from lowrank.memory import formulas
from lowrank.training import build

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    """The models to try are one: the memory of the large ones takes seconds to count."""
    monkeypatch.setattr(advise, "LADDER", advise.LADDER[:1])


def words(files, *more):
    return [f"--model={files / 'llama'}", f"--data=jsonl:{files / 'records.jsonl'}", "--config.data.seq_len=64", *more]


def test_the_command_that_it_prints_is_a_run_that_fits(files, capsys):
    assert advise.main(words(files, "--config.model.precision=float32", "--device=t4")) == 0
    out = capsys.readouterr().out
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "launch.main"]
    changes = [word for word in command if word.startswith("--config.")]
    assert "--config.model.precision=float32" in changes
    run = build.build_run(preflight.load_config(advise.CONFIG, [*changes, "--config.mesh.fsdp=1"]))
    assert run.config.method["rank"] == 8
    assert run.config.steps > 0
    assert f"by formula a step takes {formulas.estimate_memory(run).peak / 1e6:.4g} MB, and fits 1 x t4" in out
    assert "2. smollm2-135m: LoRA" in out


def test_a_value_that_is_given_is_kept_and_each_record_is_encoded_once(files, capsys, monkeypatch):
    encoded, encode = [], Examples._encode
    monkeypatch.setattr(Examples, "_encode", lambda self, i: encoded.append(i) or encode(self, i))
    assert advise.main(words(files, "--config.method.rank=2", "--device=h100")) == 0
    assert encoded == list(range(len((files / "records.jsonl").read_text().splitlines())))
    out = capsys.readouterr().out
    assert "method.rank=8" not in out
    assert out.count("--config.method.rank=2") == 1


def test_a_model_that_no_change_makes_fit_is_exit_code_1(files, capsys, monkeypatch):
    monkeypatch.setitem(advise.devices.MEMORY, "t4", 1e-6)  # a kilobyte
    assert advise.main(words(files, "--device=t4")) == 1
    out = capsys.readouterr().out
    assert "does not fit 1 x t4" in out
    assert "launch.main" not in out


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        (["--model=x"], "--model=NAME and --data=SOURCE are both required"),
        (["--model=smollm2-13m", "--data=bbc_news"], "smollm2-13m"),
        (["--device=h10"], "'h10' (did you mean 'h100'?)"),
        (["--config.methd.rank=3"], "'config.methd.rank' (did you mean 'config.method'?)"),
        (["--data=jsonl:nowhere.jsonl"], "nowhere.jsonl"),
        (["--rank=3"], "--rank=3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(given, culprit, files, capsys):
    base = [] if given[0].startswith("--model") else words(files)
    assert advise.main([*base, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error
