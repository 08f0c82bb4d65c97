"""Laws of what an adapter's folder says of its base and its tokenizer."""

import json
import os
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from launch import merge
from lowrank.adapters import load
from lowrank.core.errors import UserError
from lowrank.pretrained import export
from tests.support import checkpoint_files as files


@pytest.fixture
def base(tmp_path):
    return files.directory(tmp_path / "name", files.LLAMA)


def adapter(where, **changes):
    where.mkdir()
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": "org/name"}
    (where / "adapter_config.json").write_text(json.dumps(config | changes))
    path = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (1, 16), "B": (16, 1)}
    arrays = {path.format(i, x): np.ones(shape, np.float32) for i in range(3) for x, shape in shapes.items()}
    save_file(arrays, where / "adapter_model.safetensors")
    return where


def test_the_recorded_revision_is_fetched_and_said(tmp_path, base, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **how: asked.append((repo, how.get("revision"))) or str(base)
    )
    where = adapter(tmp_path / "a", revision="abc123")
    load.load_adapted(where)
    assert "reading org/name at revision abc123 from the hub: the adapter in" in capsys.readouterr().err
    load.load_adapted(adapter(tmp_path / "b"))
    load.load_adapted(where, "org/name")
    load.load_adapted(where, "other/name", any_base=True)
    assert asked == [("org/name", "abc123"), ("org/name", None), ("org/name", "abc123"), ("other/name", None)]


@pytest.mark.parametrize("name", [5, ["a"], {"a": 1}, True])
def test_a_name_that_is_no_text_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path must be text or null, not"):
        load.load_adapted(adapter(tmp_path / "a", base_model_name_or_path=name))


def test_the_tokenizer_of_the_adapter_takes_the_place_of_that_of_the_base(tmp_path, base, capsys):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    where = adapter(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, where)
    load.load_adapted(where, str(base))
    assert capsys.readouterr().err == ""
    (where / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    model = load.load_adapted(where, str(base))
    assert f"the tokenizer of {where} takes the place of that of name" in capsys.readouterr().err
    assert model.tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi!"
    assert model.tokenizer.stop_ids == (2, 5)


def test_the_generation_config_of_the_adapter_is_written_before_that_of_the_base(tmp_path, base):
    where = adapter(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, where)
    for folder, stops in ((base, [2, 5]), (where, [2, 6])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    model, plain = load.load_adapted(where, str(base)), load.pretrained.load(str(base))
    out = export(plain.params, model, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 6]}
    assert load.pretrained.load(str(out)).tokenizer.stop_ids == model.tokenizer.stop_ids == (2, 6)


def test_a_base_that_is_gone_is_named_by_the_flag_of_the_command(tmp_path):
    where = adapter(tmp_path / "a", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="or as --base=MODEL"):
        load.load_adapted(where)
    with pytest.raises(UserError, match="or as --model=MODEL"):
        load.load_adapted(where, flag="--model=MODEL")


def test_tensors_that_are_a_pipe_are_refused_at_once(tmp_path, base):
    where = adapter(tmp_path / "a")
    (where / "adapter_model.safetensors").unlink()
    os.mkfifo(where / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"cannot read .*adapter_model\.safetensors: it is a named pipe, not"):
        load.load_adapted(where, str(base), any_base=True)


def test_what_is_pushed_has_a_model_card(tmp_path, base, monkeypatch, capsys):
    pushed = {}

    class Hub:
        def whoami(self):
            return {}

        def create_repo(self, repo_id, **how):
            pushed["private"] = how["private"]

        def upload_folder(self, *, folder_path, repo_id, **how):
            pushed["card"] = (folder_path / "README.md").read_text()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    where = adapter(tmp_path / "a", base_model_name_or_path="name")
    merge.main([f"--adapter={where}", f"--base={base}", f"--output={tmp_path}/out", "--push=org/merged"])
    assert "pushed to https://hub/org/merged" in capsys.readouterr().out
    assert pushed["private"]
    assert 'base_model: "name"' in pushed["card"]
    assert "A merge of LoRA" in pushed["card"]
    assert not (tmp_path / ".out.lock").exists()
