"""P-tuning as a method: virtual tokens that a small network computes in training."""

from typing import Any

import jax
from flax import linen as nn

from lowrank.core.errors import unknown
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import SHARED, Export, Method


def ptuning(length: int = 20, encoder: str = "mlp", hidden: int = 128) -> Method:
    """P-tuning: virtual tokens from an encoder of an embedding `E [length, D]` (Liu et al. 2021, arXiv:2103.10385).

    `mlp` is three layers D -> hidden -> hidden -> D with ReLU between them. `lstm`, as in the paper, is two
    bidirectional LSTM layers of `hidden` units per direction, then 2 hidden -> 2 hidden -> D with ReLU between them. An
    adapter saves the tokens, not the encoder.

    Differs from the paper: the tokens stand before the text, where the paper places them anywhere in a template beside
    anchor words; the model is frozen, where it may be trained too; the MLP is PEFT's, and the paper's LSTM has half of
    D units per direction.
    """
    targets.check_positive(length=length, hidden=hidden)
    if encoder not in ENCODERS:
        raise unknown("P-tuning encoder", encoder, ENCODERS)

    def network(params: PyTree) -> nn.Module:
        return ENCODERS[encoder](*params["prompt"]["embedding"].shape, hidden)

    def bind_prompt(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
        """`params` with the prompt that the encoder computes; without an encoder they stay as they are."""
        del batch, rng
        if SHARED not in params:
            return params
        return {**params, "prompt": {"embedding": network(params).apply({"params": params[SHARED]["prompt"]})}}

    return Method(
        model_options={"num_prompt": length},
        trainable=(rf"{SHARED}/prompt/.*",),
        init_shared=lambda params, key: {"prompt": network(params).init(key)["params"]},
        bind=bind_prompt,
        export=Export(frozen=("prompt/embedding",), bound=True),
    )


class MLPEncoder(nn.Module):
    """An embedding through three layers: `[length, width]`."""

    length: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """`[length, width]`."""
        x: Any = self.param("embedding", nn.initializers.normal(1.0), (self.length, self.width))
        x = nn.relu(nn.Dense(self.hidden, name="in")(x))
        x = nn.relu(nn.Dense(self.hidden, name="mid")(x))
        return nn.Dense(self.width, name="out")(x)


class LSTMEncoder(nn.Module):
    """An embedding through two bidirectional LSTM layers and an MLP: `[length, width]`."""

    length: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """`[length, width]`."""
        x: Any = self.param("embedding", nn.initializers.normal(1.0), (self.length, self.width))[None]
        for i in range(2):
            forward, backward = (nn.RNN(nn.LSTMCell(self.hidden, name=f"{way}{i}")) for way in ("forward", "backward"))
            x = nn.Bidirectional(forward, backward)(x)
        x = nn.relu(nn.Dense(2 * self.hidden, name="in")(x[0]))
        return nn.Dense(self.width, name="out")(x)


ENCODERS: dict[str, type[nn.Module]] = {"mlp": MLPEncoder, "lstm": LSTMEncoder}
