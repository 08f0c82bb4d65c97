"""(IA)^3 as a method: rescaled keys, values and feed-forward activations."""

from lowrank.core.weight import Rewrite
from lowrank.methods.method import Method
from lowrank.methods.options import own_meaning
from lowrank.weights import scaled


@own_meaning("target")
def ia3(target: str = r".*attn/(k|v)/kernel", feedforward: str = r".*mlp/down/kernel") -> Method:
    """(IA)^3: rescales the outputs of `target` and the inputs of `feedforward` ('' for none).

    `l * (x W)` and `(l * x) W`, where l `[out]` or `[in]` starts as ones (Liu et al. 2022, arXiv:2205.05638). See
    `lowrank.weights.scaled`. Raises UserError for a weight that both match.
    """
    sides = ((target, "out"), (feedforward, "in"))

    def rule(side: str) -> Rewrite:
        return lambda key, w, name: scaled.attach(w, side)

    return Method(rules=tuple((pattern, rule(side)) for pattern, side in sides if pattern))
