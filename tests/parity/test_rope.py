"""The angles of rotary positions are those of transformers: to the last bit, as positions multiply what is off."""

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowrank.models.rope import RopeScaling, rope_frequencies
from tests.support.close import assert_close

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
