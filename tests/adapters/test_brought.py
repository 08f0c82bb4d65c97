"""Adapters as people have them: of the hub, with other names, added tokens, changed bases and single experts."""

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import merge
from lowrank.adapters import load
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight, materialize
from lowrank.pretrained import hub
from tests.adapters.test_load import adapter
from tests.support import checkpoint_files as files
from tests.support.close import assert_close

PRE, TABLE, HEAD = "base_model.model.", "model.embed_tokens.weight", "lm_head.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Q = "model.layers.1.self_attn.q_proj"
MIXTRAL = {**files.LLAMA, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.fixture
def base(tmp_path):
    return files.directory(tmp_path / "name", files.LLAMA)


def kernels(model):
    return {name: np.asarray(materialize(w)) for name, w in tree.named_leaves(model.params, is_weight)}


def rewrite(where, change):
    """Writes `change(tensors)` in place of the adapter's tensors."""
    save_file(change(load_file(where / "adapter_model.safetensors")), where / "adapter_model.safetensors")
    return where


def test_an_adapter_of_the_hub_is_read_at_its_revision_and_said(tmp_path, base, monkeypatch, capsys):
    where = adapter(tmp_path / COMMIT)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **how: asked.append((repo, how)) or str(where)
    )
    found = load.load_adapted("org/tuned@v2", str(base), any_base=True)
    said = capsys.readouterr().err
    assert "reading the adapter org/tuned at revision v2 from the hub" in said
    assert f"its commit is {COMMIT}: org/tuned@{COMMIT} is this adapter" in said
    [(repo, how)] = asked
    assert (repo, how["revision"]) == ("org/tuned", "v2")
    assert "adapter_model.safetensors" in how["allow_patterns"]
    assert not any(pattern in how["allow_patterns"] for pattern in ("*", "*.safetensors", "*.bin"))
    assert_close(kernels(found), kernels(load.load_adapted(where, str(base), any_base=True)))


def test_a_hub_adapter_that_cannot_be_had_is_one_line(monkeypatch):
    def fail(repo, **how):
        raise ValueError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot fetch 'org/tuned' from the hub .*: no network$"):
        load.load_adapted("org/tuned")


def test_the_adapters_name_inside_its_tensors_names_is_left_out(tmp_path, base):
    plain = adapter(tmp_path / "a", modules_to_save=["lm_head"])
    rewrite(plain, lambda found: {**found, PRE + HEAD: np.ones((32, 16), np.float32)})
    named = adapter(tmp_path / "b", modules_to_save=["lm_head"])

    def with_name(found):
        inner = {key.replace(".weight", ".mine.weight"): x for key, x in found.items()}
        head = {"lm_head.modules_to_save.mine.weight": 1, "lm_head.original_module.weight": 2}
        return inner | {PRE + key: np.full((32, 16), x, np.float32) for key, x in head.items()}

    rewrite(named, with_name)
    expected, found = (load.load_adapted(where, str(base), any_base=True) for where in (plain, named))
    assert_close(kernels(found), kernels(expected))
    rewrite(named, lambda found: {**found, PRE + Q + ".lora_A.other.weight": np.ones((1, 16), np.float32)})
    with pytest.raises(UserError, match="holds the adapters mine and other: save each in a folder of its own"):
        load.load_adapted(named, str(base), any_base=True)


def test_added_tokens_come_with_their_embedding(tmp_path, base):
    rows = np.random.default_rng(1).normal(size=(35, 16)).astype(np.float32)
    where = rewrite(adapter(tmp_path / "a"), lambda found: {**found, PRE + TABLE: rows})
    model = load.load_adapted(where, str(base), any_base=True)
    assert model.config.vocab_size == model.hf_config["vocab_size"] == 35
    np.testing.assert_array_equal(model.params["embed"]["embedding"], rows)


def test_of_two_tables_with_added_tokens_both_are_needed(tmp_path):
    base = files.directory(tmp_path / "name", {**files.LLAMA, "tie_word_embeddings": False})
    rows = np.random.default_rng(1).normal(size=(35, 16)).astype(np.float32)
    where = rewrite(adapter(tmp_path / "a"), lambda found: {**found, PRE + TABLE: rows})
    message = r"embed_tokens.weight has 35 rows, and the base has 32: save lm_head too, whose tokens were added"
    with pytest.raises(UserError, match=message):
        load.load_adapted(where, str(base), any_base=True)
    rewrite(where, lambda found: {**found, PRE + HEAD: 2 * rows})
    model = load.load_adapted(where, str(base), any_base=True)
    np.testing.assert_array_equal(model.params["head"]["kernel"], 2 * rows.T)


def test_an_init_that_changed_the_base_is_undone_by_the_initial_adapter(tmp_path, base):
    where = adapter(tmp_path / "a", init_lora_weights="pissa_niter_4", lora_alpha=3, use_rslora=True)
    with pytest.raises(UserError, match=r"pissa_niter, which changed its base: convert it in peft by .*INITIAL\)"):
        load.load_adapted(where, str(base), any_base=True)
    start = rewrite(adapter(where / "pissa_init"), lambda found: {key: 0.5 * x for key, x in found.items()})
    (start / "adapter_config.json").unlink()
    found, plain = load.load_adapted(where, str(base), any_base=True), load.pretrained.load(str(base))
    change = kernels(found)["layers/attn/q/kernel"] - kernels(plain)["layers/attn/q/kernel"]
    assert_close(change, np.full_like(change, 3 * (1 - 0.25)))


def test_an_init_that_quantized_the_base_needs_that_base(tmp_path, base):
    where = adapter(tmp_path / "a", init_lora_weights="loftq")
    with pytest.raises(
        UserError,
        match="loftq, which changed its base: save that base and its tokenizer in residual_base inside the folder",
    ):
        load.load_adapted(where, str(base), any_base=True)
    files.directory(where / "residual_base", files.LLAMA)
    found = load.load_adapted(where)
    assert found.folders == (str(where / "residual_base"),)
    expected = load.load_adapted(adapter(tmp_path / "b"), str(where / "residual_base"), any_base=True)
    assert_close(kernels(found), kernels(expected))


def test_experts_that_are_modules_are_those_of_the_stack(tmp_path):
    base, rng = files.directory(tmp_path / "name", MIXTRAL), np.random.default_rng(2)
    where = adapter(tmp_path / "a", target_modules=["w1", "w2"], r=2, lora_alpha=4)
    path, width = PRE + "model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight", MIXTRAL["intermediate_size"]
    sizes = {"w1": (16, width), "w2": (width, 16)}
    arrays = {}
    for layer, expert, (name, (n_in, n_out)) in (
        (i, e, item) for i in range(3) for e in range(3) for item in sizes.items()
    ):
        arrays[path.format(layer, expert, name, "A")] = rng.normal(size=(2, n_in)).astype(np.float32)
        arrays[path.format(layer, expert, name, "B")] = rng.normal(size=(n_out, 2)).astype(np.float32)
    rewrite(where, lambda found: arrays)
    found, plain = kernels(load.load_adapted(where, str(base), any_base=True)), kernels(load.pretrained.load(str(base)))
    for name, ours in {"w1": "gate", "w2": "down"}.items():
        change = found[f"layers/mlp/experts/{ours}/kernel"] - plain[f"layers/mlp/experts/{ours}/kernel"]
        for i, e in np.ndindex(3, 3):
            a, b = (arrays[path.format(i, e, name, x)] for x in "AB")
            assert_close(change[i, e], 2 * (b @ a).T, relative=1e-5)
    np.testing.assert_array_equal(found["layers/mlp/experts/up/kernel"], plain["layers/mlp/experts/up/kernel"])


class FakeApi:
    """What of the hub's client an upload uses."""

    calls = []  # noqa: RUF012

    def whoami(self):
        if self.calls is None:
            raise OSError("Invalid user token.\nmore")

    def create_repo(self, repo_id, **how):
        self.calls.append(("create", repo_id, how))

    def upload_folder(self, **how):
        self.calls.append(("upload", how["repo_id"], sorted(path.name for path in how["folder_path"].iterdir())))
        return "https://hub/commit"


@pytest.mark.parametrize("public", [False, True])
def test_a_merged_checkpoint_is_pushed_whole(tmp_path, base, monkeypatch, capsys, public):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    where = adapter(tmp_path / "a", base_model_name_or_path=str(base))
    words = [f"--adapter={where}", f"--output={tmp_path / 'out'}", "--push=org/merged"]
    merge.main([*words, *(["--public"] if public else [])])
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert FakeApi.calls == [
        ("create", "org/merged", {"private": not public, "exist_ok": True}),
        ("upload", "org/merged", names),
    ]
    assert "pushed to https://hub/commit" in capsys.readouterr().out


def test_a_push_that_cannot_succeed_is_refused_before_the_merge(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    with pytest.raises(
        UserError, match=r"cannot push to 'org/merged': Invalid user token\. \(`hf auth login` logs in\)"
    ):
        hub.check_push("org/merged")
    with pytest.raises(UserError, match=r"cannot push to 'a/b/c': "):
        hub.check_push("a/b/c")
