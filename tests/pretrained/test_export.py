"""Laws of exporting: what is written is read back as the same model, and nothing is lost or half written."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.core.files import write_text
from lowrank.models.context import as_own
from lowrank.pretrained import export, load
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import BERT, GEMMA3, GPT2, LLAMA
from tests.support.close import assert_same

CONFIGS = {"llama": LLAMA, "gemma3": GEMMA3, "gpt2": GPT2, "bert": BERT}


@pytest.fixture
def llama(tmp_path):
    return load(str(files.directory(tmp_path / "model", LLAMA)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_come_back_under_their_names(tmp_path, name):
    arrays = files.tensors(CONFIGS[name])
    base = load(str(files.write_directory(tmp_path / "in", CONFIGS[name], arrays)))
    written = load_file(export(base.params, base, tmp_path / "out") / "model.safetensors")
    assert written.keys() == arrays.keys()
    for key, x in arrays.items():
        np.testing.assert_array_equal(written[key], x, err_msg=key)
    assert_same(load(str(tmp_path / "out")).params, base.params)


def test_the_config_and_tokenizer_come_along(tmp_path, llama):
    out = export(llama.params, llama, tmp_path / "out")
    again = load(str(out))
    assert again.config == llama.config
    assert again.tokenizer.encode("w4 w9") == llama.tokenizer.encode("w4 w9")
    assert again.hf_config["architectures"] == ["LlamaForCausalLM"]
    card = (out / "README.md").read_text()
    assert f'base_model: "{llama.name}"' in card
    assert "license:  # fill it in" in card
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    "options", [{"context": 128}, {"context": 128, "rope": "ntk"}, {"position_factor": 2.0}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_context_that_an_option_extends_is_the_checkpoints_own(tmp_path, name, options):
    base = load(str(files.directory(tmp_path / "in", CONFIGS[name])), model=options)
    again = load(str(export(base.params, base, tmp_path / "out")))
    assert again.config == as_own(base.config)
    assert again.config.max_length == base.config.max_length > CONFIGS[name]["max_position_embeddings"]


def test_a_context_that_config_json_cannot_say_is_refused_as_the_model_is_read(tmp_path):
    folder = str(files.directory(tmp_path / "in", {**LLAMA, "model_type": "phi3", "pad_token_id": 0}))
    message = "model.context=128 by model.rope=yarn cannot be written to a phi3 config.json: choose another model.rope"
    with pytest.raises(UserError, match=message):
        load(folder, model={"context": 128})


def test_what_lies_beside_the_tensors_comes_along(tmp_path):
    folder = files.directory(tmp_path / "model", LLAMA)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "top_p": 0.9}))
    (folder / "vocab.txt").write_text("w4")
    base = load(str(folder))
    for name in ("generation_config.json", "vocab.txt"):
        assert (export(base.params, base, tmp_path / f"out-{name}") / name).read_text() == (folder / name).read_text()
    assert load(str(tmp_path / "out-vocab.txt")).tokenizer.stop_ids == (2, 5)


def test_a_model_that_ends_at_several_tokens_still_does_without_a_generation_config(tmp_path):
    base = load(str(files.directory(tmp_path / "model", {**LLAMA, "eos_token_id": [2, 5]})))
    base = dataclasses.replace(base, hf_config={**base.hf_config, "eos_token_id": 2})
    assert load(str(export(base.params, base, tmp_path / "out"))).tokenizer.stop_ids == (2, 5)


def test_the_names_of_classes_come_along_in_their_order(tmp_path):
    named = {**BERT, "id2label": {"1": "no", "0": "yes"}}
    base = load(str(files.directory(tmp_path / "model", named)), model={"num_labels": 2})
    written = json.loads((export(base.params, base, tmp_path / "out") / "config.json").read_text())
    assert written["id2label"] == {"0": "yes", "1": "no"}
    assert written["label2id"] == {"yes": 0, "no": 1}
    given = export(base.params, base, tmp_path / "given", labels=["a", "b"])
    assert json.loads((given / "config.json").read_text())["id2label"] == {"0": "a", "1": "b"}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_readable_by_whom_the_umask_says(tmp_path, llama, mask):
    before = os.umask(mask)
    try:
        out = export(llama.params, llama, tmp_path / "out")
        text = write_text(tmp_path / "run" / "report.md", "text")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (*out.iterdir(), text)}
    assert modes == {0o666 & ~mask}
    assert {path.stat().st_mode & 0o777 for path in (out, text.parent)} == {0o777 & ~mask}


def test_a_gguf_model_becomes_a_directory(tmp_path):
    base = load(str(files.gguf_twin(tmp_path / "x.gguf", GEMMA3, files.tensors(GEMMA3), "gemma3")))
    again = load(str(export(base.params, base, tmp_path / "out")))
    assert again.config == base.config
    assert_same(again.params, base.params)


def test_a_full_shard_begins_the_next(tmp_path, llama):
    out = export(llama.params, llama, tmp_path / "out", shard_bytes=4000)
    shards = sorted(out.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    assert all(sum(x.nbytes for x in load_file(p).values()) <= 4000 or len(load_file(p)) == 1 for p in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(llama.params))
    assert_same(load(str(out)).params, llama.params)


def test_bfloat16_is_rounded_once(tmp_path, llama):
    out = export(llama.params, llama, tmp_path / "out", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama.params)
    assert_same(load(str(out), param_dtype="bfloat16").params, rounded)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_classifier_keeps_its_labels(tmp_path):
    folder = files.directory(tmp_path / "in", BERT)
    base = load(str(folder), model={"num_labels": 2})
    out = export(base.params, base, tmp_path / "out", labels=["sport", "tech"])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "sport", "1": "tech"}
    assert_same(load(str(out), model={"num_labels": 2}).params, base.params)
    with pytest.raises(UserError, match="3 labels cannot name the model's 2 classes"):
        export(base.params, base, tmp_path / "more", labels=["a", "b", "c"])


def test_stacks_and_meshes_leave_no_trace(tmp_path):
    folder = str(files.directory(tmp_path / "in", LLAMA))
    base = load(folder, model={"top_layers": 1}, mesh=sharding.make_mesh(1, 4, 2))
    export(base.params, base, tmp_path / "out")
    assert_same(load(str(tmp_path / "out")).params, load(folder).params)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_prompt": 3}, "model.num_prompt=3 cannot be written"), ({"window": 7}, "model.window=7 cannot be written")],
)
def test_what_a_checkpoint_cannot_tell_is_refused(tmp_path, options, message):
    base = load(str(files.directory(tmp_path / "in", LLAMA)), model=options)
    with pytest.raises(UserError, match=message):
        export(base.params, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_leaf_too_many_or_too_few_is_named(tmp_path, llama):
    with pytest.raises(UserError, match="leaf 'prompt/embedding' has no place in a checkpoint"):
        export({**llama.params, "prompt": {"embedding": jnp.ones((2, 16))}}, llama, tmp_path / "out")
    with pytest.raises(UserError, match="leaf 'norm/scale' is missing"):
        export({k: v for k, v in llama.params.items() if k != "norm"}, llama, tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path, llama):
    (tmp_path / "out").mkdir()
    export(llama.params, llama, tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        export(llama.params, llama, tmp_path / "out")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        export(llama.params, llama, tmp_path / "other", dtype="int8")


def test_a_failed_write_leaves_nothing_behind(tmp_path, llama):
    class Full:
        pad_id = 0

        def save(self, directory):
            raise OSError(28, "No space left on device")

    broken = dataclasses.replace(llama, tokenizer=Full())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        export(llama.params, broken, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
