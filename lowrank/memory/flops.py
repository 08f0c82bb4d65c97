"""The floating-point operations of a training step by formula, a multiplication and an addition each counting as one.

A product of a token with an entry of a kernel takes two in the forward pass and two for the gradient of its input. An
entry that is trained takes two more for its own gradient. A step of an adapter on N parameters and D tokens thus takes
about 4ND, and full fine-tuning 6ND. Compilers count the body of a loop once, so that their count is of no use here.
"""

import dataclasses
import math
from typing import Any

from lowrank import models
from lowrank.core import tree, weight
from lowrank.memory.shapes import StepInputs
from lowrank.training.run import Run


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one step, on all devices together."""

    model: int  # the forward and the backward pass
    recomputed: int  # what rematerialization computes again

    @property
    def executed(self) -> int:
        """All operations that the devices make."""
        return self.model + self.recomputed


def step_flops(run: Run, r: StepInputs) -> Flops:
    """The operations of a step of `run`. Without the embedding, norms and the decoding of codes, which are few."""
    c, (*rows, length) = run.network.config, r.batch["tokens"].shape
    shape = (*rows, length + c.num_virtual_tokens)
    tokens = math.prod(shape)
    blocks, trained = _entries(run, True), _entries(run, True, trained=True)
    head, head_trained = _entries(run, False), _entries(run, False, trained=True)
    attention = _attention_flops(c, shape)
    model = tokens * (4 * (blocks + head) + 2 * (trained + head_trained)) + 3 * attention
    again = tokens * 2 * blocks + attention if c.remat not in ("none", "dots", "dots_all") else 0
    return Flops(model, again + (attention if c.remat == "dots" else 0))


def _entries(run: Run, in_layers: bool, trained: bool = False) -> int:
    """The entries of kernels that a token is multiplied with, in the layers or outside of them."""
    learns = dict(tree.named_leaves(run.mask))
    return math.ceil(
        sum(
            _used(run.network.config, name) * _size(name, w, learns, trained)
            for name, w in tree.named_leaves(run.shapes, weight.is_weight)
            if (name.split("/")[0] in tree.STACKS) == in_layers and _multiplies(name, w, run)
        )
    )


def _multiplies(name: str, w: Any, run: Run) -> bool:
    """Whether tokens are multiplied with the leaf: a kernel of a layer, or the head."""
    config = run.network.config
    if name.startswith("embed/"):
        tied = getattr(config, "tied", False) and run.objective.vocabulary_logits
        return name.endswith("embedding") and bool(tied)
    return weight.is_weight(w) or name.endswith("kernel")


def _size(name: str, w: Any, learns: dict[str, bool], trained: bool) -> int:
    """The entries of a weight and of the arrays that it learns; or of the trained ones among them alone."""
    if not weight.is_weight(w):
        return w.size if not trained or learns[name] else 0
    parts = [(f"{name}/{part}", leaf) for part, leaf in tree.named_leaves(w)]
    own = sum(leaf.size for part, leaf in parts if learns[part])
    if trained:
        return own
    base = math.prod(w.shape)
    return base + sum(leaf.size for part, leaf in parts if learns[part] and leaf.size < base)


def _used(config: Any, name: str) -> float:
    """The share of a leaf's entries that one token uses: of a mixture's experts, those that its router chooses."""
    return config.experts_per_token / config.experts if "/experts/" in name else 1.0


def _attention_flops(config: Any, shape: tuple[int, ...]) -> int:
    """Scores and their product with values in a forward pass; causal, so that a token sees half of its row."""
    tokens, length = math.prod(shape), shape[-1]
    decoder = isinstance(config, models.DecoderConfig)
    width = config.heads * config.head_dim if decoder else config.width
    seen = length / 2 if decoder else length
    window = getattr(config, "window", 0)
    local = sum(config.local_layers) if getattr(config, "local_layers", ()) else config.layers if window else 0
    near = min(window if decoder else 2 * window - 1, seen) if window else seen
    positions = 2 * getattr(config, "relative_buckets", 0)  # scores of queries and of keys with all relative positions
    return math.ceil(4 * tokens * width * (local * near + (config.layers - local) * seen + config.layers * positions))
