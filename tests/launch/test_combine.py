"""`python -m launch.combine`: a merge, the command that trains it further, and one line for bad input."""

import shlex
import subprocess
import sys

import jax
import pytest
import yaml

from launch import combine, preflight
from lowrank import pretrained
from lowrank.adapters import peft
from lowrank.training import build
from tests.launch.test_merge_score import CONFIG
from tests.support import permuted_models
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.dense_families import dense
from tests.support.merged_models import family

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return family(tmp_path_factory.mktemp("models"), 2)


def arguments(tmp_path, **recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [f"--recipe={tmp_path / 'recipe.yaml'}", f"--output={tmp_path / 'merged'}"]


def listed(models, names="ab"):
    return [{"model": str(models[n]), "parameters": {"weight": 1.0}} for n in names]


def trained(out, files, *more):
    """The run of the command that is printed last, on the tiny records."""
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[:3] == ["python", "-m", "launch.main"]
    changes = [w for w in words if w.startswith("--config.") and ".data.source=" not in w]
    tiny_run = [
        "--config.data.seq_len=32",
        "--config.mesh.fsdp=1",
        *more,
        f"--config.data.source=jsonl:{files}/records.jsonl",
    ]
    config = preflight.load_config(words[3].removeprefix("--config="), [*changes, *tiny_run])
    return build.build_run(config)


def test_the_command_merges_and_says_how_to_train_on(models, files, tmp_path):
    words = arguments(tmp_path, merge_method="linear", models=listed(models))
    done = subprocess.run([sys.executable, "-m", "launch.combine", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"merged into {tmp_path / 'merged'}: relative distance to {models['a']} 0." in done.stdout
    assert "100%" in done.stderr  # the progress bar
    run = trained(done.stdout, files, "--config.method.rank=2")
    assert run.config.model["name"] == str(tmp_path / "merged")
    assert run.config.method["name"] == "lora"
    with pytest.raises(SystemExit) as stop:
        combine.main(words)
    assert stop.value.code == 2


def test_a_merged_adapter_is_trained_further_with_its_own_settings(files, tmp_path, capsys):
    base = pretrained.load(str(files / "llama"))
    params, _ = adapted(base.params, {"name": "lora", "rank": 2, "target": ".*attn/q/kernel"})
    peft.save(params, base, tmp_path / "a")
    models = [{"model": f"{files}/llama+{tmp_path}/a", "parameters": {"weight": 0.5}}] * 2
    combine.main(arguments(tmp_path, merge_method="linear", models=models, adapter={"rank": 3}))
    run = trained(capsys.readouterr().out, files)
    assert (run.adapter.folder, run.model.name) == (tmp_path / "merged", f"{files}/llama")
    assert (run.config.method["name"], run.config.method["rank"]) == ("lora", 3)


def test_new_routers_and_repeated_layers_are_trained_as_a_whole(files, tmp_path, capsys):
    base = str(dense(tmp_path / "base", "llama"))
    experts = [{"source_model": base}] * 2
    combine.main(arguments(tmp_path, base_model=base, gate_mode="random", experts=experts))
    out = capsys.readouterr().out
    assert out.startswith("mixture of 2 experts, the rest by uniform_soup, of 1 model: ")
    run = trained(out, files)
    assert run.config.method["name"] == "full"
    assert all(jax.tree.leaves(run.mask))


def test_an_encoder_is_trained_as_a_classifier(files, tmp_path, capsys):
    base = tiny.bert(tmp_path / "base")
    models = {"a": base, "b": permuted_models.bert(base, tmp_path / "b")}
    given = {"merge_method": "linear", "models": listed(models), "align": {"method": "matching"}}
    combine.main(arguments(tmp_path, **given))
    out = capsys.readouterr().out
    assert "% of the units and heads were moved to align it" in out
    assert trained(out, files).config.objective == "classification"


@pytest.mark.all
def test_the_barrier_is_printed_where_the_recipe_has_a_score(tmp_path, capsys):
    source = tiny.llama(tmp_path / "source")
    models = {"a": source, "b": permuted_models.llama(source, tmp_path / "b")}
    records = tiny.records(tmp_path / "records.jsonl", 6)
    (tmp_path / "config.py").write_text(CONFIG.format(records=records))
    given = {"merge_method": "linear", "models": listed(models), "align": {}}
    combine.main(arguments(tmp_path, **given, score={"config": str(tmp_path / "config.py")}))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("barrier on the line to"))
    before, after = (float(x.split()[0]) for x in line.partition(f"{models['b']}: ")[2].split(" and "))
    assert before > 1e-3
    assert after < 1e-3 * before


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    combine.main([*arguments(tmp_path, merge_method="linear", models=listed(models)), "--dry_run"])
    out = capsys.readouterr().out
    assert out.startswith(f"linear of 2 models: {models['a']}, {models['b']}\n")
    assert "nothing was written" in out
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_home_and_variables_are_written_out_in_flags_and_in_the_recipe(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(models["a"].parent))
    monkeypatch.setenv("PLACE", str(tmp_path))
    near = [{"model": f"~/{models[n].name}"} for n in "ab"]
    arguments(tmp_path, merge_method="linear", models=[{**m, "parameters": {"weight": 1.0}} for m in near])
    words = ["--recipe=$PLACE/recipe.yaml", "--output=~/merged", "--dry_run"]
    combine.main(words)
    assert "nothing was written" in capsys.readouterr().out
    arguments(tmp_path, merge_method="fisher", models=[{**m, "statistics": "$PLACE/none.safetensors"} for m in near])
    with pytest.raises(SystemExit):
        combine.main(words)
    assert f"{tmp_path}/none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output=x"], "--recipe=FILE.yaml and --output=DIR are both required"),
        (["--recipe=missing.yaml", "--output=x"], "recipe missing.yaml cannot be read: No such file or directory"),
        (["--recipe=missing.yaml", "--outptu=x"], "outptu"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        combine.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
