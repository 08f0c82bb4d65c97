"""The angles of rotary positions are those of transformers: to the last bit, as positions multiply what is off."""

import copy

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
