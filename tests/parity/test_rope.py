"""The angles of rotary positions are those of transformers: to the last bit, as positions multiply what is off."""

import copy
import random

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowrank.models.rope import RopeScaling, rope_frequencies
from lowrank.pretrained.families import FAMILIES
from tests.support.close import assert_close

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


FACTORS = [1.0 + 0.25 * i for i in range(32)]
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": [2 * x for x in FACTORS]}
YARN = {"rope_type": "yarn", "factor": 4.0}
CASES = [  # (rope parameters, other fields of the config, tokens of the row)
    ({"rope_type": "linear", "factor": 4}, {}, 1),
    ({"type": "dynamic", "factor": 4.0}, {}, 4096),
    ({"type": "dynamic", "factor": 4.0}, {}, 2048),
    (YARN, {}, 1),
    ({**YARN, "truncate": False, "original_max_position_embeddings": 512}, {}, 1),
    ({**YARN, "factor": None}, {"original_max_position_embeddings": 512}, 1),
    ({**YARN, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2}, {}, 1),
    ({**YARN, "attention_factor": 1.5}, {}, 1),
    ({**LONGROPE, "original_max_position_embeddings": 512}, {}, 512),
    ({**LONGROPE, "original_max_position_embeddings": 512}, {}, 513),
    ({**LONGROPE, "factor": 3.0}, {"original_max_position_embeddings": 256}, 100),
    ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 512}, {}, 1),
]


@pytest.mark.parametrize(("parameters", "fields", "tokens"), CASES)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_every_kind_has_the_frequencies_and_the_attention_factor_of_transformers(parameters, fields, tokens, form):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, **fields}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
    theta = {"rope_theta": 1e4} if form == "rope_scaling" else {}
    given = {form: {**parameters, **({} if theta else {"rope_theta": 1e4})}, **theta}
    scaling = FAMILIES["llama"].config({"model_type": "llama", **sizes, **given}).rope_scaling
    config = transformers.LlamaConfig(**sizes, **copy.deepcopy(given))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", seq_len=tokens)
    ours = np.asarray(rope_frequencies(64, 1e4, scaling, np.array([[tokens]]))).reshape(-1)
    assert_close(ours, frequencies.numpy(), relative=1.2e-6, per_element=True)
    assert scaling.kind in ("dynamic", "llama3") or np.array_equal(ours, frequencies.numpy())
    assert_close(scaling.of_cosines, attention_factor, relative=1e-12)


FAMILY_NAMES = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "olmo2", "phi3", "granite"),
    *("smollm3", "gemma2", "gemma3_text"),
]
OPTIONAL = {  # the numbers that a config may leave out, each with some of its values
    "yarn": {
        "original_max_position_embeddings": [512, 1024],
        "beta_fast": [16, 64.0, None],
        "beta_slow": [2, 1.0, None],
        "mscale": [0.707, 1.0, 0, None],
        "mscale_all_dim": [1.0, 0.5, 0, None],
        "attention_factor": [1.3, None],
        "truncate": [True, False, None],
    },
    "llama3": {"original_max_position_embeddings": [512, 1024]},
    "longrope": {
        "original_max_position_embeddings": [512, 1024],
        "factor": [3.0, None],
        "attention_factor": [1.2, None],
    },
}
NEEDED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": FACTORS, "long_factor": [2 * x for x in FACTORS]},
}


def drawn(rng, family):
    """A config of the family with rope parameters in the old form, the new one or both, some of them left out."""

    def some(options):
        return {k: rng.choice(values) for k, values in options.items() if rng.random() < 0.5}

    kind = "longrope" if family == "phi3" else rng.choice(sorted(NEEDED))  # transformers has no other kind in Phi-3
    gemma = family == "gemma3_text"  # transformers ignores its `type`, and finds `truncate` in no kind of layer
    key = "rope_type" if gemma else rng.choice(["type", "rope_type"])
    rope = {key: kind, **NEEDED[kind], **some(OPTIONAL.get(kind, {}))}
    if gemma:
        rope.pop("truncate", None)
    if kind == "yarn" and rng.random() < 0.3:
        rope["factor"] = None
    beside = some({"original_max_position_embeddings": [512, 256], "rope_theta": [1e4, 5e5]})
    form = "old" if gemma else rng.choice(["old", "new", "both"])
    if form == "new":
        return {**beside, "rope_parameters": {**rope, **some({"rope_theta": [1e4, 3e5]})}}
    return {**beside, "rope_scaling": rope, **({"rope_parameters": {"rope_type": "default"}} if form == "both" else {})}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_drawn_configs_are_read_as_transformers_reads_them(family):
    rng = random.Random(family)
    for _ in range(60):
        sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
        sizes |= {"max_position_embeddings": 2048, "num_hidden_layers": 6, "intermediate_size": 8, "vocab_size": 99}
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        spec, tokens = {**sizes, **drawn(rng, family)}, rng.choice([300, 600, 2048, 2049, 4096])
        ours = FAMILIES[family].config({"model_type": family, **copy.deepcopy(spec)})
        config = transformers.AutoConfig.for_model(family, **copy.deepcopy(spec))
        layer = {"layer_type": "full_attention"} if "full_attention" in config.rope_parameters else {}
        kind = (config.rope_parameters["full_attention"] if layer else config.rope_parameters)["rope_type"]
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=tokens, **layer)
        found = rope_frequencies(64, ours.rope_theta, ours.rope_scaling, np.array([[tokens]]))
        assert_close(np.asarray(found).reshape(-1), expected.numpy(), relative=3e-6, per_element=True)
        assert_close(ours.rope_scaling.of_cosines, factor, relative=1e-12)


def theirs(theta, head_dim, **scaling):
    rope = {"rope_theta": theta, "rope_type": "default"} | scaling
    config = transformers.LlamaConfig(
        head_dim=head_dim, rope_parameters=rope, max_position_embeddings=2**17, hidden_size=4 * head_dim
    )
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_those_of_transformers_to_the_bit(theta, head_dim):
    np.testing.assert_array_equal(rope_frequencies(head_dim, theta), theirs(theta, head_dim))
    stretched = rope_frequencies(head_dim, theta, RopeScaling("linear", 4.0))
    np.testing.assert_array_equal(stretched, theirs(theta, head_dim, rope_type="linear", factor=4.0))


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_llama3_frequencies_are_those_of_transformers_but_for_the_order_of_rounding(theta):
    """Torch divides by a number as it multiplies by its inverse."""
    ours = rope_frequencies(128, theta, RopeScaling("llama3", 8.0))
    expected = theirs(theta, 128, rope_type="llama3", factor=8.0, **LLAMA3)
    assert_close(ours, expected, relative=1.2e-6, per_element=True)
    assert np.mean(ours == expected) > 0.9
