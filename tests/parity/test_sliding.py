"""Sliding perplexity is that of transformers' loop for models of a fixed length."""

import numpy as np
import torch
import transformers

from lowrank import pretrained
from lowrank.evaluation import long_context
from lowrank.models import build_model
from tests.support.checkpoint_files import LLAMA, directory
from tests.support.close import assert_close
from tests.support.tiny_models import tokens


def by_transformers(model, ids, length, stride):
    """The losses of huggingface.co/docs/transformers/perplexity, with labels of -100 where windows overlap."""
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        inputs = torch.tensor(ids[None, begin:end], dtype=torch.long)
        labels = inputs.clone()
        labels[:, : -(end - before)] = -100
        if (labels[:, 1:] != -100).any():
            mean = model(inputs, labels=labels).loss.item()
            found.append((mean, int((labels[:, 1:] != -100).sum())))
        before = end
        if end == len(ids):
            break
    return found


def test_sliding_perplexity_is_that_of_the_loop_of_transformers(tmp_path):
    folder = directory(tmp_path / "llama", LLAMA)
    base = pretrained.load(str(folder))
    ids = tokens(1, 50)[0] % LLAMA["vocab_size"]
    reader = long_context.Reader(build_model(base.config), base.params, rows=2)
    scores = long_context.token_scores(reader, [ids], 12, 5)  # the loop's length counts the token predicted last
    with torch.no_grad():
        losses = by_transformers(transformers.LlamaForCausalLM.from_pretrained(folder), ids, 13, 5)
    means, counts = np.array(losses).T
    assert counts.sum() == len(scores.nll) == 49
    assert_close(scores.nll.sum(), np.sum(means * counts))
