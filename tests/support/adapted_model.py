"""A model with a method attached, as some training would leave it. For tests."""

import jax

from lowrank import methods
from lowrank.core import tree
from lowrank.core.weight import declared_mask, is_weight, name_key
from tests.support.weight_forms import shaken


def adapted(params, group, size=1.0, train=()):
    """`(parameters with everything trained moved by about size, names of the trained leaves)`.

    What pads a smaller rank stays zero, and what weights share is bound. `train` are patterns beside the method's own.
    """
    method = methods.build_method(
        group
    )  # no program: each would hold a random generator of its own, a second to compile
    start = methods.attach(method, params, jax.random.key(1))
    mask = declared_mask(start, (*method.trainable, *train))
    moved = tree.map_named(_moved, start, is_leaf=is_weight)
    moved = jax.tree.map(lambda x, y, learns: x + size * (y - x) if learns else x, start, moved, mask)
    names = [name for name, learns in tree.named_leaves(mask) if learns]
    return (method.bind(moved, None, None) if methods.SHARED in moved else moved), names


def _moved(name, w):
    key = name_key(jax.random.key(2), name)
    return shaken(w, key) if is_weight(w) else w + 0.3 * jax.random.normal(key, w.shape, w.dtype)
