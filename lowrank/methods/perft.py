"""PERFT as a method: low-rank modules routed beside a mixture of experts."""

from lowrank.core.errors import UserError
from lowrank.methods import targets
from lowrank.methods.method import Method


def perft(width: int = 8, experts: int = 4, per_token: int = 2, scale: float = 1.0) -> Method:
    """PERFT: low-rank experts of `width` beside every mixture of experts (Liu et al. 2024, arXiv:2411.08212).

    `MoE(x) + scale * sum_e g_e(x) x @ down_e @ up_e`. A further router sends each token to `per_token` of the modules
    (PERFT-R). With `experts=0` there is one module beside each expert, with the gate of that expert (PERFT-E). Gates
    are normalized as in the mixture.

    Differs from the paper: there is no balance loss. The gate of a routed module comes from its own router, as in the
    formula; the authors' code uses the mixture's gate of the same rank in its place.
    """
    targets.check_positive(width=width, scale=scale)
    if experts < 0:
        raise UserError(f"method.experts must not be negative, not {experts}")
    if experts and not 1 <= per_token <= experts:
        raise UserError(f"method.per_token={per_token} is not in 1..{experts}")
    model = {"routed_width": width, "routed_experts": experts, "routed_per_token": per_token, "routed_scale": scale}
    return Method(model_options=model, trainable=(r"(layers|top)/mlp/routed/.*",))
