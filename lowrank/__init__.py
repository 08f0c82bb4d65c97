"""Parameter-efficient fine-tuning in JAX: a weight is anything that can be multiplied."""

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.tree import join, split
from lowrank.core.weight import Weight, dot, materialize, merge, rewrite

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
    "tree",
]
