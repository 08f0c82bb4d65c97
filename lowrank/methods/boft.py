"""BOFT as a method: inputs rotated by a butterfly of orthogonal matrices."""

from lowrank.methods import targets
from lowrank.methods.method import Method
from lowrank.methods.oft import kernel_rule
from lowrank.weights import oft as form


def boft(block: int = 8, factors: int = 2, target: str = r".*attn/(q|v|qkv)/kernel") -> Method:
    """BOFT: inputs rotated by a butterfly of orthogonal blocks, outputs scaled (Liu et al. 2023, arXiv:2311.06243).

    The factors together act on blocks of `block * 2^(factors - 1)` inputs, which must divide the inputs of every
    target. See `lowrank.weights.oft`.

    Differs from the paper: there is no multiplicative dropout.
    """
    targets.check_positive(block=block, factors=factors)
    return Method(rules=((target, kernel_rule(lambda w: form.attach_butterfly(w, block=block, factors=factors))),))
