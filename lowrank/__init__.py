"""Parameter-efficient fine-tuning in JAX: a weight is anything that can be multiplied."""

from lowrank import methods, tree
from lowrank.errors import UserError
from lowrank.tree import join, split
from lowrank.weight import Weight, dot, materialize, merge, rewrite, trainable_mask

__all__ = [
    "UserError",
    "Weight",
    "dot",
    "join",
    "materialize",
    "merge",
    "methods",
    "rewrite",
    "split",
    "trainable_mask",
    "tree",
]
