"""Laws of reading a checkpoint: every value where it belongs, in any layout, and nothing wrong passes unseen."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.models import build_model
from lowrank.pretrained import describe, hf_files, hub, load, load_tensors
from lowrank.pretrained.families import FAMILIES
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import BERT, DTYPES, GEMMA3, GPT2, LLAMA
from tests.support.close import assert_same

QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": False}
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1}
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "gemma3": GEMMA3, "gpt2": GPT2, "bert": BERT, "roberta": ROBERTA}


@pytest.fixture
def llama(tmp_path):
    return files.directory(tmp_path / "model", LLAMA)


def edit(folder, **changes):
    """Rewrites the checkpoint with some tensors replaced; None removes one."""
    arrays = load_file(folder / "model.safetensors") | changes
    save_file({name: x for name, x in arrays.items() if x is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_lands_in_its_leaf_and_layer(tmp_path, name):
    arrays = files.tensors(CONFIGS[name])
    read = load(str(files.write_directory(tmp_path / "m", CONFIGS[name], arrays)))
    leaves = dict(tree.named_leaves(read.params))
    for tensor in FAMILIES[read.family].tensors(read.config):
        parts = [arrays[n].T if tensor.transpose else arrays[n] for n in tensor.names]
        np.testing.assert_array_equal(leaves.pop(tensor.leaf), np.reshape(parts, tensor.stack + parts[0].shape))
    assert not leaves
    assert read.new == ()


def test_the_model_runs_on_what_was_read(llama):
    read = load(str(llama))
    logits = build_model(read.config).apply({"params": read.params}, np.arange(6)[None])
    assert logits.shape == (1, 6, LLAMA["vocab_size"])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_stored_dtypes_are_cast_once_to_the_parameters(tmp_path, stored, param_dtype):
    arrays = files.tensors(LLAMA)
    read = load(str(files.write_directory(tmp_path / "m", LLAMA, arrays, dtype=stored)), param_dtype=param_dtype)
    kernel = read.params["layers"]["mlp"]["up"]["kernel"]
    want = arrays["model.layers.1.mlp.up_proj.weight"].T.astype(DTYPES[stored])
    assert all(leaf.dtype == param_dtype for leaf in jax.tree.leaves(read.params))
    np.testing.assert_array_equal(
        np.asarray(kernel[1], np.float32), want.astype(np.dtype(kernel.dtype)).astype(np.float32)
    )


def test_shards_hold_what_one_file_holds(tmp_path):
    one = files.directory(tmp_path / "one", LLAMA)
    three = files.directory(tmp_path / "three", LLAMA, shards=3)
    assert_same(load(str(one)).params, load(str(three)).params)
    assert len(list(three.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_mesh_changes_where_values_are_and_not_what_they_are(tmp_path, name, axes):
    folder = str(files.directory(tmp_path / "m", CONFIGS[name]))
    mesh = sharding.make_mesh(*axes)
    whole, spread = load(folder), load(folder, mesh=mesh)
    assert_same(whole.params, spread.params)
    wanted = sharding.parameter_shardings(spread.params, mesh)
    assert jax.tree.map(lambda x: x.sharding, spread.params) == wanted


def test_a_shard_is_read_without_the_rest_of_its_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(load_tensors, "CHUNK_BYTES", 64)
    folder = str(files.directory(tmp_path / "m", LLAMA))
    assert_same(load(folder).params, load(folder, mesh=sharding.make_mesh(1, 4, 2)).params)
    seen, read = [], hf_files._read

    def record(path, offset, dtype, shape, start, stop):
        seen.append((shape, stop - start))
        return read(path, offset, dtype, shape, start, stop)

    monkeypatch.setattr(hf_files, "_read", record)
    load(folder, mesh=sharding.make_mesh(1, 1, 8))
    assert max(rows for shape, rows in seen if shape == (24, 16)) == 1  # of mlp/up: 64 bytes are one row


def test_top_layers_are_the_last_of_the_same_stack(llama):
    whole, cut = load(str(llama)), load(str(llama), model={"top_layers": 1})
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), cut.params["layers"], cut.params["top"])
    assert_same(joined, whole.params["layers"])


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bert", "bert."), ("llama", "model.")])
def test_a_bare_checkpoint_without_the_prefix_is_the_same_model(tmp_path, name, prefix):
    arrays = files.tensors(CONFIGS[name])
    whole = files.write_directory(tmp_path / "whole", CONFIGS[name], arrays)
    bare = {key.removeprefix(prefix): x for key, x in arrays.items()}
    assert bare.keys() != arrays.keys()
    assert_same(load(str(whole)).params, load(str(files.write_directory(tmp_path / "b", CONFIGS[name], bare))).params)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_norms_under_their_old_names_are_the_same_model(tmp_path, prefix):
    arrays, old = files.tensors(BERT), {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    whole = load(str(files.write_directory(tmp_path / "new", BERT, arrays)))
    for new, name in old.items():
        arrays = {key.removeprefix(prefix).replace(new, name): x for key, x in arrays.items()}
    folder = files.write_directory(tmp_path / "old", BERT, arrays)
    assert_same(whole.params, load(str(folder)).params)
    again = next(key for key in arrays if key.endswith(".gamma"))
    edit(folder, **{again.replace(".gamma", ".weight"): arrays[again]})
    with pytest.raises(UserError, match=r"'\S*LayerNorm.gamma' is there under the name '\S*LayerNorm.weight' too"):
        load(str(folder))


def test_new_leaves_depend_on_the_seed_alone(llama):
    options = {"num_labels": 3, "num_prompt": 5}
    first, again = load(str(llama), model=options, seed=1), load(str(llama), model=options, seed=1)
    other = load(str(llama), model=options, seed=2)
    assert first.new == ("head/kernel", "prompt/embedding")
    assert_same(first.params, again.params)
    assert (first.params["head"]["kernel"] != other.params["head"]["kernel"]).any()
    assert (first.params["embed"]["embedding"] == other.params["embed"]["embedding"]).all()
    assert first.params["prompt"]["embedding"].std() > 0


def test_a_classifier_keeps_the_head_it_came_with(tmp_path):
    arrays = files.tensors(BERT)
    arrays |= {"classifier.weight": np.ones((3, 16), np.float32), "classifier.bias": np.arange(3, dtype=np.float32)}
    folder = files.write_directory(tmp_path / "m", BERT, arrays)
    read = load(str(folder), model={"num_labels": 3})
    assert read.new == ()
    assert (read.params["head"]["kernel"] == 1).all()
    with pytest.raises(
        UserError, match=r"'classifier.bias' has shape \(3,\), the config needs \(4,\)|'classifier.weight'"
    ):
        load(str(folder), model={"num_labels": 4})


def test_a_missing_pooler_is_new(tmp_path):
    arrays = {k: v for k, v in files.tensors(BERT).items() if "pooler" not in k}
    read = load(str(files.write_directory(tmp_path / "m", BERT, arrays)))
    assert read.new == ("pooler/bias", "pooler/kernel")


def test_added_biases_are_zero_and_those_of_the_checkpoint_must_be_there(llama, tmp_path):
    read = load(str(llama), model={"biases": True, "top_layers": 1})
    leaves = dict(tree.named_leaves(read.params))
    kernels = {n.removesuffix("kernel") for n in leaves if n.endswith("kernel") and not n.startswith("head")}
    assert set(read.new) == {f"{name}bias" for name in kernels}
    assert all(not np.any(leaves[name]) for name in read.new)
    own = files.directory(tmp_path / "own", {**LLAMA, "attention_bias": True})
    assert set(load(str(own), model={"biases": True}).new) == {f"layers/mlp/{m}/bias" for m in ("gate", "up", "down")}
    edit(own, **{"model.layers.1.self_attn.q_proj.bias": None})
    with pytest.raises(UserError, match=r"q_proj\.bias' is missing"):
        load(str(own), model={"biases": True})


def test_describe_reads_no_tensor(llama):
    config, tokenizer, shapes = describe(str(llama), {"remat": "none"}, param_dtype="bfloat16")
    read = load(str(llama), param_dtype="bfloat16")
    (llama / "model.safetensors").unlink()
    assert describe(str(llama))[0].remat == "full"
    assert config.remat == "none"
    assert tokenizer.eos_id == read.tokenizer.eos_id
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), read.params)


def test_what_was_read_says_what_it_is(llama):
    read = load(str(llama))
    assert (read.family, read.name, read.hf_config) == ("llama", "model", LLAMA)


def test_a_parameter_that_was_read_can_be_donated(llama):
    kernel = load(str(llama)).params["layers"]["mlp"]["up"]["kernel"]
    before = np.array(kernel)
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(kernel)
    np.testing.assert_array_equal(after, before + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"tensor 'model.layers.1.mlp.up_proj.weight' is missing"),
        ({"model.layers.1.mlp.upp.weight": np.ones((2, 2))}, r"'model.layers.1.mlp.upp.weight' has no place"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((24, 16))}, r"'model.layers.3.mlp.up_proj.weight' has no place"),
        (
            {"model.layers.2.mlp.up_proj.weight": np.ones((16, 24))},
            r"'model.layers.2.mlp.up_proj.weight' has shape \(16, 24\), the config needs \(24, 16\)",
        ),
        ({"model.norm.weight": np.ones(16, np.int8)}, r"'model.norm.weight' is I8"),
    ],
)
def test_a_wrong_tensor_is_named(llama, change, message):
    edit(llama, **change)
    with pytest.raises(UserError, match=message) as error:
        load(str(llama))
    assert "\n" not in str(error.value)


def test_a_misspelt_tensor_is_suggested(llama):
    arrays = load_file(llama / "model.safetensors")
    edit(llama, **{"model.norm.weight": None, "model.norms.weight": arrays["model.norm.weight"]})
    with pytest.raises(UserError, match=r"'model.norm.weight' is missing \(did you mean 'model.norms.weight'\?\)"):
        load(str(llama))


def test_tensors_that_carry_nothing_are_passed_over(llama):
    before = load(str(llama)).params
    edit(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    assert_same(before, load(str(llama)).params)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smolm2-135m", r"unknown model 'smolm2-135m' \(did you mean 'smollm2-135m'\?\); known: gemma3-270m, minilm"),
        ("./nowhere/model", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("nothing.gguf", "nothing.gguf is not a file"),
        ("model.bin", "model 'model.bin' is a file: name the directory it is in"),
    ],
)
def test_an_unknown_model_is_refused(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=message):
        describe(spec)


def test_an_unknown_family_is_refused_with_those_that_are_known(llama):
    (llama / "config.json").write_text(json.dumps({**LLAMA, "model_type": "lama"}))
    with pytest.raises(UserError, match=r"unknown model type 'lama' \(did you mean 'llama'\?\); known: bert, deberta"):
        describe(str(llama))


@pytest.mark.parametrize(("file", "text"), [("config.json", None), ("config.json", "{"), ("config.json", "[1]")])
def test_a_bad_config_file_is_named(llama, file, text):
    (llama / file).unlink() if text is None else (llama / file).write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        describe(str(llama))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"hidden_size": "wide"}, "hidden_size must be a whole number or null, not 'wide'"),
        ({"num_attention_heads": 0}, "its config cannot be used: ZeroDivisionError"),
        ({"hidden_act": "swoosh"}, "unknown activation"),
        ({"rms_norm_eps": 1e300}, "its config gives the model a norm_eps of 1e.300, beyond float32"),
        ({"model_type": ["llama"]}, "model_type must be text or null, not \\['llama'\\]"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(llama, change, message):
    (llama / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(UserError, match=rf"model(/config.json)?: {message}") as error:
        describe(str(llama))
    assert "\n" not in str(error.value)


def test_an_unknown_model_option_or_dtype_is_refused(llama):
    with pytest.raises(UserError, match=r"model\.rematt.*model\.remat"):
        load(str(llama), model={"rematt": "none"})
    with pytest.raises(UserError, match="unknown param_dtype 'float31'"):
        load(str(llama), param_dtype="float31")


def test_a_hub_model_is_its_snapshot(llama, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns, others=ignore_patterns)
        return str(llama)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
    read = load("some-org/some.model")
    assert read.name == asked["repo_id"] == "some-org/some.model"
    assert "*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["patterns"])
    there = ["model.safetensors", "config.json", "onnx/model.safetensors", "consolidated.safetensors", "model.bin"]
    chosen = filter_repo_objects(there, allow_patterns=asked["patterns"], ignore_patterns=asked["others"])
    assert list(chosen) == ["model.safetensors", "config.json"]
    assert_same(read.params, load(str(llama)).params)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def snapshot_download(repo_id, **patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"cannot fetch 'org/name' from the hub .*: no route$"):
        load("org/name")


def test_bfloat16_parameters_round_to_nearest(tmp_path):
    arrays = files.tensors(LLAMA)
    read = load(str(files.write_directory(tmp_path / "m", LLAMA, arrays)), param_dtype="bfloat16")
    want = arrays["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read.params["embed"]["embedding"], want)
