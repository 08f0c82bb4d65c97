"""Laws of whole embeddings and heads in an adapter: a tied base gets what an untied checkpoint of them computes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import pretrained
from lowrank.adapters import load
from lowrank.adapters.export import merge_to_hf
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
