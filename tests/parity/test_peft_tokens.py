"""Token rows and whole modules go to `peft` and come from it, also where the head shares the embedding."""

import copy

import jax
import numpy as np
import peft
import pytest

from lowrank import methods
from lowrank.adapters import peft as peft_format
from lowrank.core import tree
from lowrank.core.errors import UserError
from tests.support.close import assert_close, difference
from tests.support.parity_bases import make, our_logits, randomize, their_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
IDS = [9, 5, 40]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make(lambda: tmp_path_factory.mktemp("base"), ("llama", "tied llama", "gpt2"))


def moved(params, group):
    """`(params with what the method trains moved, names of it)`."""
    method = methods.build_method(group)
    params = methods.attach(method, params, jax.random.key(0))
    mask = methods.trainable_mask(method, params)
    noise = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x, m: x + 0.3 * noise.normal(size=x.shape).astype(np.float32) if m else x, params, mask
    )
    params, mask = methods.exported_leaves(method, params, mask)
    return params, [n for n, learns in tree.named_leaves(mask) if learns]


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_peft_loads_our_rows_and_computes_our_logits(name, bases, tmp_path):
    model, base, plain = bases[name]
    params, trained = moved(plain, {"name": "tokens", "tokens": IDS})
    peft_format.save(params, base, tmp_path, trained=trained)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), theirs) > 0.02
    assert_close(our_logits(base, params), theirs, relative=2e-5)
    jax.tree.map(np.testing.assert_array_equal, peft_format.load(tmp_path, plain, base), params)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_we_load_rows_of_peft_and_compute_its_logits(name, bases, tmp_path):
    model, base, plain = bases[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(token_indices=IDS)).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5)
    theirs.save_pretrained(tmp_path)
    assert difference(their_logits(model), their_logits(theirs)) > 0.02
    assert peft_format.describe_adapter(tmp_path).model == {}
    assert_close(our_logits(base, peft_format.load(tmp_path, plain, base)), their_logits(theirs), relative=2e-5)


@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_rows_beside_a_lora_go_to_peft_and_come_from_it(name, bases, tmp_path):
    model, base, plain = bases[name]
    group = {"name": "dora" if name == "llama" else "lora", "rank": 4, "alpha": 10.0, "also_tokens": IDS}
    params, trained = moved(plain, group)
    peft_format.save(params, base, tmp_path / "ours", trained=trained, method=group)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours"))
    rowless = {**params, "embed": {"embedding": plain["embed"]["embedding"]}}
    assert difference(our_logits(base, rowless), theirs) > 0.02
    assert_close(our_logits(base, params), theirs, relative=2e-5)
    jax.tree.map(np.testing.assert_array_equal, peft_format.load(tmp_path / "ours", plain, base), params)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], trainable_token_indices=IDS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(
        our_logits(base, peft_format.load(tmp_path / "theirs", plain, base)), their_logits(theirs), relative=2e-5
    )


@pytest.mark.parametrize("also", ["norm/scale", "head/kernel", ("embed/embedding", "norm/.*")])
def test_peft_loads_the_modules_that_a_lora_trains_whole(also, bases, tmp_path):
    model, base, plain = bases["llama"]
    group = {"name": "lora", "rank": 4, "alpha": 10.0, "also_train": also}
    params, trained = moved(plain, group)
    peft_format.save(params, base, tmp_path, trained=trained, method=group)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), theirs) > 0.02
    assert_close(our_logits(base, params), theirs, relative=2e-5)
    jax.tree.map(np.testing.assert_array_equal, peft_format.load(tmp_path, plain, base), params)


def test_rows_with_what_peft_has_no_place_for_are_refused(bases, tmp_path):
    _, base, plain = bases["llama"]
    params, trained = moved(plain, {"name": "tokens", "tokens": IDS, "also_train": "norm/scale"})
    with pytest.raises(UserError, match="of type TRAINABLE_TOKENS cannot hold norm/scale"):
        peft_format.save(params, base, tmp_path, trained=trained)
    params, trained = moved(plain, {"name": "tokens", "tokens": IDS})
    peft_format.save(params, base, tmp_path, trained=trained)
    group = {"name": "ia3", "also_tokens": IDS}
    params, trained = moved(plain, group)
    with pytest.raises(UserError, match="of type IA3 cannot hold embed/embedding/rows: only LORA can"):
        peft_format.save(params, base, tmp_path / "ia3", trained=trained, method=group)
    small = {**plain, "embed": {"embedding": plain["embed"]["embedding"][:40]}}
    with pytest.raises(UserError, match="must be distinct ids below the vocabulary size 40"):
        peft_format.load(tmp_path, small, base)
