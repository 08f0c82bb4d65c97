"""Laws of whole embeddings and heads in an adapter: a tied base gets what an untied checkpoint of them computes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import pretrained
from lowrank.adapters import load
from lowrank.adapters.export import merge_to_hf
from lowrank.core.errors import UserError
from lowrank.models import build_model
from tests.adapters.test_load import adapter
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import LLAMA
from tests.support.close import assert_close

TABLE, HEAD, PRE = "model.embed_tokens.weight", "lm_head.weight", "base_model.model."
TOKENS = np.arange(4, 12)[None]


def logits(model):
    return build_model(model.config).apply({"params": model.params}, TOKENS)


@pytest.mark.parametrize(("table", "head"), [(1.5, 0.5), (1.0, 0.5), (1.5, 1.0), (1.5, 1.5)])
def test_a_merge_is_the_checkpoint_with_both(tmp_path, table, head):
    arrays = files.tensors(LLAMA)
    base = files.write_directory(tmp_path / "name", LLAMA, arrays)
    rows = arrays[TABLE]
    where = adapter(tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    held = load_file(where / "adapter_model.safetensors")
    files.save_file({**held, PRE + TABLE: table * rows, PRE + HEAD: head * rows}, where / "adapter_model.safetensors")
    model = load.load_adapted(where, str(base), any_base=True)
    merge_to_hf(model.params, model, tmp_path / "out")
    again = pretrained.load(str(tmp_path / "out"))
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (table == head)
    np.testing.assert_array_equal(whole[TABLE], np.float32(table) * rows)
    np.testing.assert_array_equal(whole.get(HEAD, whole[TABLE]), np.float32(head) * rows)
    assert_close(logits(again), logits(model), relative=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensured", [False, True])
def test_a_lora_on_the_embedding_moves_the_head_only_where_peft_ties_them(tmp_path, tied, ensured):
    arrays = files.tensors({**LLAMA, "tie_word_embeddings": tied})
    base = files.write_directory(tmp_path / "name", {**LLAMA, "tie_word_embeddings": tied}, arrays)
    rows, rng = arrays[TABLE], np.random.default_rng(0)
    a, b = rng.normal(size=(2, len(rows))), rng.normal(size=(rows.shape[1], 2))
    held = {f"{PRE}model.embed_tokens.lora_embedding_{n}": x for n, x in {"A": a, "B": b}.items()}
    if tied and ensured:  # as peft writes them: the head's factors too, without naming the head as a target
        held |= {f"{PRE}lm_head.lora_{n}.weight": x for n, x in {"A": b.T, "B": a.T}.items()}
    where = embedding_adapter(tmp_path / "a", held, ensure_weight_tying=ensured)
    model = load.load_adapted(where, str(base), any_base=True)
    merge_to_hf(model.params, model, tmp_path / "out")
    whole, moved = load_file(tmp_path / "out" / "model.safetensors"), rows + 2 * (b @ a).T
    assert_close(whole[TABLE], moved, relative=1e-6)
    head = moved if tied and ensured else rows if tied else arrays[HEAD]
    assert_close(whole.get(HEAD, whole[TABLE]), head, relative=1e-6)


def test_factors_that_should_be_tied_and_differ_are_refused(tmp_path):
    base = files.write_directory(tmp_path / "name", LLAMA, files.tensors(LLAMA))
    vocab, width = LLAMA["vocab_size"], LLAMA["hidden_size"]
    held = {
        f"{PRE}model.embed_tokens.lora_embedding_{n}": np.ones(s) for n, s in {"A": (2, vocab), "B": (width, 2)}.items()
    }
    held |= {f"{PRE}lm_head.lora_{n}.weight": 2 * np.ones(s) for n, s in {"A": (2, width), "B": (vocab, 2)}.items()}
    where = embedding_adapter(tmp_path / "a", held, ensure_weight_tying=True)
    with pytest.raises(UserError, match="the factors of lm_head are not those of model"):
        load.load_adapted(where, str(base), any_base=True)


def embedding_adapter(where, held, **config):
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"], **config}
    where.mkdir()
    (where / "adapter_config.json").write_text(json.dumps(about))
    files.save_file(
        {k: np.ascontiguousarray(x, np.float32) for k, x in held.items()}, where / "adapter_model.safetensors"
    )
    return where
