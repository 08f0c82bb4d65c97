"""Adapters of peft with other inits, names and numbers of tokens compute its logits."""

import copy
import dataclasses
import json
import types

import peft
import pytest
from safetensors.torch import save_file

from lowrank.adapters import load
from lowrank.adapters import peft as peft_format
from tests.support.checkpoint_files import write_tokenizer
from tests.support.close import assert_close, difference
from tests.support.parity_bases import QKVO, VOCAB, make, our_logits, randomize, their_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora.*already.*:UserWarning"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make(lambda: tmp_path_factory.mktemp("base"), ("llama", "tied llama"))


def trained(model, **options):
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=QKVO, **options)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def train(theirs):
    """Moves the adapter a little from where it starts."""
    parameters = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    start = {n: p.detach().clone() for n, p in parameters}
    randomize(parameters, seed=5)
    for name, p in parameters:
        p.data.copy_(start[name] + 0.3 * p.data)


def assert_ours_is(theirs, bases, where, name="llama"):
    model, base, plain = bases[name]
    expected = their_logits(theirs)
    assert difference(their_logits(model), expected) > 0.005
    assert_close(our_logits(base, peft_format.load(where, plain, base)), expected, relative=1e-4)


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", "pissa", "olora"])
def test_an_adapter_with_this_init(bases, tmp_path, init):
    # EVA takes its start from data, and warns without: its file is that of any other start, but for the name.
    theirs = trained(bases["llama"][0], init_lora_weights="gaussian" if init == "eva" else init)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    assert_ours_is(theirs, bases, tmp_path)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_a_randomized_pissa_with_its_initial_adapter_or_converted(bases, tmp_path, converted, options):
    theirs = trained(bases["llama"][0], init_lora_weights="pissa_niter_4", **options)
    start, config = tmp_path / "pissa_init", theirs.peft_config["default"]
    config.init_lora_weights = True
    theirs.save_pretrained(start)
    config.init_lora_weights = "pissa_niter_4"
    train(theirs)
    where = tmp_path / "converted" if converted else tmp_path
    extra = {"path_initial_model_for_weight_conversion": str(start)} if converted else {}
    expected = copy.deepcopy(theirs)
    theirs.save_pretrained(where, **extra)
    assert_ours_is(expected, bases, where)


def test_loftq_with_the_base_that_it_quantized(bases, tmp_path):
    # PEFT quantizes on a GPU alone: rounding stands for it, and the file is that of any other start, but for the name.
    rounded = copy.deepcopy(bases["llama"][0])
    for name, p in rounded.named_parameters():
        if any(target in name for target in QKVO):
            p.data = p.data.mul(16).round() / 16
    theirs = trained(rounded, init_lora_weights="gaussian")
    train(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "loftq"}))
    expected = their_logits(theirs)
    theirs.unload().save_pretrained(tmp_path / "residual_base")
    write_tokenizer(tmp_path / "residual_base", VOCAB)
    found = load.load_adapted(tmp_path)
    assert difference(their_logits(bases["llama"][0]), expected) > 0.005
    assert_close(our_logits(found, found.params), expected, relative=1e-4)


def test_the_names_of_torch(bases, tmp_path):
    theirs = trained(bases["llama"][0], use_dora=True)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    state = {name: x.contiguous() for name, x in theirs.state_dict().items() if "lora_" in name}
    assert any(".lora_magnitude_vector.default.weight" in name for name in state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    assert_ours_is(theirs, bases, tmp_path)


@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_added_tokens(bases, tmp_path, name):
    model, base, plain = bases[name]
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    theirs = trained(larger)
    train(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    view = types.SimpleNamespace(
        config=dataclasses.replace(base.config, vocab_size=VOCAB + 3), family=base.family, name=base.name
    )
    assert_close(our_logits(view, peft_format.load(tmp_path, plain, base)), their_logits(theirs), relative=1e-4)
