"""OFT as a method: inputs rotated by an orthogonal matrix."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank.core.errors import UserError
from lowrank.methods import targets
from lowrank.methods.method import Method
from lowrank.weights import oft as form


def oft(block: int = 32, target: str = r".*attn/(q|v|qkv)/kernel", share: bool = False, terms: int = 0) -> Method:
    """OFT: inputs rotated by an orthogonal, block-diagonal matrix (Qiu et al. 2023, arXiv:2306.07280).

    `block` must divide the inputs of every target. With `share`, all blocks of a kernel are the same. A block is a
    Cayley transform or, with `terms` (at least 4), the sum of this many terms of its Neumann series, as in OFTv2. See
    `lowrank.weights.oft`.

    Differs from the paper: `block` is the size of the blocks, where the paper gives their number; COFT's bound on the
    distance of R from the identity, and the magnitudes that are fitted after training, are left out.
    """
    targets.check_positive(block=block)
    if terms and terms < 4:
        raise UserError(f"method.terms must be 0 (exact) or at least 4, not {terms}")
    return Method(rules=((target, kernel_rule(lambda w: form.attach(w, block=block, share=share, terms=terms))),))


def kernel_rule(attach: Callable[[Any], Any]) -> Callable[[jax.Array, Any, str], Any]:
    """The rewrite of a method that starts without random numbers; its errors begin with the name of the kernel."""

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        del key
        targets.check_kernel(name)
        try:
            return attach(w)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None

    return adapt
