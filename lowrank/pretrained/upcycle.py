"""Sparse upcycling, the `model.upcycle` group of a config: a dense decoder is read as a mixture of experts.

Every expert of a layer starts as the layer's MLP, and the layer gets a random router (Komatsuzaki et al. 2023,
arXiv:2212.05055). A token's gates sum to 1, so that the initial mixture computes the same function as the MLP.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.core.weight import name_key
from lowrank.models import DecoderConfig
from lowrank.models.layers import kernel_init
from lowrank.pretrained.hf_tensors import Tensor

ROUTER = r"(layers|top)/mlp/router/kernel"


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """A mixture of `experts`, `top_k` of them per token. The routers are drawn from `seed`, not from the run's seed."""

    experts: int
    top_k: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"model.upcycle.top_k={self.top_k} is not in 1..{self.experts}, the number of experts")

    def mixture_config(self, where: str, dense: Any) -> DecoderConfig:
        """The config of the mixture. Raises UserError for a model that cannot become a mixture."""
        reasons = {
            "an encoder": not isinstance(dense, DecoderConfig),
            "a mixture of experts already": getattr(dense, "experts", 0),
            "a decoder whose MLP has no gate": not getattr(dense, "gated", True),
            "a decoder whose MLP has biases": getattr(dense, "mlp_bias", False),
            "a decoder whose MLP has one kernel for gate and up": getattr(dense, "fused_gate_up", False),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"{where} is {reason}: model.upcycle makes experts of a gated MLP without biases")
        return dataclasses.replace(dense, **self._mixture())

    def _mixture(self) -> dict[str, Any]:
        return {"experts": self.experts, "experts_per_token": self.top_k, "normalize_gates": True}

    def check_options(self, model: Mapping[str, Any]) -> None:
        """Raises UserError for options of the model that set the mixture's fields, too."""
        for name in self._mixture().keys() & model.keys():
            raise UserError(f"model.{name} and model.upcycle both set the mixture: leave out model.{name}")

    def expert_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the mixture's leaves: each expert is read from its layer's MLP. Routers have no tensors."""
        return [self._of_experts(t) if re.fullmatch(r"\w+/mlp/\w+/kernel", t.leaf) else t for t in tensors]

    def _of_experts(self, tensor: Tensor) -> Tensor:
        return dataclasses.replace(tensor, leaf=tensor.leaf.replace("/mlp/", "/mlp/experts/"), experts=self.experts)

    def init_routers(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The routers among `leaves`, each drawn with a key of its name, in its leaf's dtype and sharding."""
        routers = {name: leaf for name, leaf in leaves.items() if re.fullmatch(ROUTER, name)}

        def init(key: jax.Array) -> dict[str, jax.Array]:
            return {n: kernel_init(name_key(key, n), x.shape, "float32").astype(x.dtype) for n, x in routers.items()}

        return jax.jit(init, out_shardings={n: x.sharding for n, x in routers.items()})(jax.random.key(self.seed))


def build_upcycling(given: Mapping[str, Any] | None) -> Upcycling | None:
    """The `model.upcycle` group `{"experts": E, "top_k": K, "seed": 0}`; None without one. Raises UserError."""
    return config_schema.call_with_group(Upcycling, given, "model.upcycle") if given else None
