"""Prompts and prefixes go to `peft` and come from it, and the logits are the same."""

import copy
import dataclasses
import types

import jax
import numpy as np
import peft
import pytest

from lowrank import methods
from lowrank.adapters import peft as peft_format
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.models import build_model
from tests.support.close import assert_close, difference
from tests.support.parity_bases import make, our_logits, randomize, their_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning"),
]
T = 4
OURS = {
    "prompt": {"name": "prompt", "length": T},
    "p-tuning": {"name": "ptuning", "length": T, "hidden": 8},
    "prefix": {"name": "prefix", "length": T},
    "prefix of an mlp": {"name": "prefix", "length": T, "reparam": True, "hidden": 8},
}
THEIRS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "p-tuning mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "p-tuning lstm": (
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    ),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix of an mlp": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8}),
}
BASES = ("llama", "gpt2", "llama classifier", "roberta classifier")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make(lambda: tmp_path_factory.mktemp("base"), BASES)


def opened(base, params, options):
    """`(base, params)` as a model is loaded with these options: with a place for what it adds."""
    config = dataclasses.replace(base.config, **options)
    init = jax.eval_shape(lambda: build_model(config).init(jax.random.key(0), np.ones((1, 2), np.int32))["params"])
    noise = np.random.default_rng(0)
    new = {name: noise.normal(size=x.shape).astype(np.float32) for name, x in tree.named_leaves(init)}
    new |= {name: x for name, x in tree.named_leaves(params) if name in new}
    spec = types.SimpleNamespace(config=config, family=base.family, name=base.name, new=())
    return spec, tree.map_named(lambda name, _: new[name], init)


def cases(table):
    """Each case on each base; on an encoder's classifier only prefixes are the same in peft."""
    return [(case, name) for case in table for name in BASES if "roberta" not in name or "prefix" in case]


@pytest.mark.parametrize(("case", "name"), cases(OURS))
def test_peft_loads_our_prompt_and_computes_our_logits(case, name, bases, tmp_path):
    model, base, plain = bases[name]
    method = methods.build_method(OURS[case])
    base, params = opened(base, plain, method.model_options)
    params = methods.attach(method, params, jax.random.key(0))
    params, mask = methods.exported_leaves(method, params, methods.trainable_mask(method, params))
    trained = [n for n, learns in tree.named_leaves(mask) if learns]
    peft_format.save(params, base, tmp_path, trained=trained, method=OURS[case])
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))[:, -12:]
    assert difference(their_logits(model), theirs) > 0.01
    assert_close(our_logits(base, params), theirs, relative=2e-5)
    again = peft_format.load(tmp_path, jax.tree.map(np.zeros_like, params), base)
    jax.tree.map(
        np.testing.assert_array_equal, again[part := next(iter({"prompt", "prefix"} & set(again)))], params[part]
    )
    assert peft_format.describe_adapter(tmp_path).model.items() >= method.model_options.items()


@pytest.mark.parametrize(("case", "name"), cases(THEIRS))
def test_we_load_a_prompt_of_peft_and_compute_its_logits(case, name, bases, tmp_path):
    model, base, plain = bases[name]
    kind, options = THEIRS[case]
    task = "SEQ_CLS" if "classifier" in name else "CAUSAL_LM"
    theirs = peft.get_peft_model(copy.deepcopy(model), kind(task_type=task, num_virtual_tokens=T, **options)).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5)
    theirs.save_pretrained(tmp_path)
    about = peft_format.describe_adapter(tmp_path)
    base, params = opened(base, plain, about.model)
    mine = peft_format.load(tmp_path, params, base)
    expected = their_logits(theirs)[:, -12:]
    assert difference(their_logits(model), expected) > 0.01
    assert_close(our_logits(base, mine), expected, relative=2e-5)
    again = peft_format.save(mine, base, tmp_path / "again", method={"name": "ptuning"} if "p-t" in case else {})
    assert peft_format.describe_adapter(again) == about
    jax.tree.map(np.testing.assert_array_equal, peft_format.load(again, params, base), mine)


def test_a_prompt_that_does_not_fit_is_refused(bases, tmp_path):
    _, base, plain = bases["llama"]
    wide, params = opened(base, plain, {"num_prompt": T})
    peft_format.save(params, wide, tmp_path)
    with pytest.raises(UserError, match="has 4 virtual tokens: load its base with num_prompt=4"):
        peft_format.load(tmp_path, plain, base)
    with pytest.raises(UserError, match=r"cannot hold the trained leaf norm/scale"):
        peft_format.save(params, wide, tmp_path / "b", trained=["norm/scale"])
    both, params = opened(base, plain, {"num_prompt": T, "prefix_length": 2})
    with pytest.raises(UserError, match="a prompt, a prefix or rewritten weights"):
        peft_format.save(params, both, tmp_path / "b")
    _, encoder, plain = bases["roberta classifier"]
    encoder, params = opened(encoder, plain, {"num_prompt": T})
    with pytest.raises(UserError, match="by the first virtual token"):
        peft_format.save(params, encoder, tmp_path / "b")
