"""LoRA with a frozen A, and LoRA with both factors frozen around a small core: LoRA-FA, LoRA-XS, EDoRA.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is no method of its own: it is `optim.b_ratio` with any of LoRA's kin.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank import settings
from lowrank.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Method
from lowrank.weights import lora_xs as form
from lowrank.weights.lora import LoRA


def lora_fa(**kwargs: Any) -> Method:
    """LoRA-FA: LoRA's options, with A kept as it was drawn and B trained (Zhang et al. 2023, arXiv:2308.03303).

    Half of the parameters to learn, and no backward pass needs the layer's whole input `[..., in]`, only its
    product with A, `[..., r]`.
    """
    if kwargs.get("init") == "zero_a":
        raise UserError("LoRA-FA freezes A: with init=zero_a nothing would ever be learned")
    method = settings.call(lora, kwargs, "method")
    [(target, _)] = method.rewrite
    kept = (f"(?:{target})/a",)
    return dataclasses.replace(method, freeze=kept, holds=kept)


def lora_xs(rank: int = 16, **kwargs: Any) -> Method:
    """LoRA-XS: LoRA's options but `init`, and only an r x r core is trained; see `lowrank.weights.lora_xs`."""
    return _around_core(form.attach, rank, kwargs)


def edora(rank: int = 16, **kwargs: Any) -> Method:
    """EDoRA: LoRA-XS's options, with a learned magnitude for each output; see `lowrank.weights.lora_xs`."""
    return _around_core(form.attach_edora, rank, kwargs)


def _around_core(attach: Callable[[LoRA], LoRA], rank: int, kwargs: dict[str, Any]) -> Method:
    if "init" in kwargs:
        raise UserError("method.init: the factors of LoRA-XS and EDoRA are the base's singular vectors")
    method = settings.call(lora, {"rank": rank, **kwargs}, "method")
    [(target, adapt)] = method.rewrite
    around = ((target, lambda key, w, name: attach(adapt(key, w, name))),)
    # an adapter holds the singular vectors too: another machine may find them with other signs
    return dataclasses.replace(method, rewrite=around, holds=(f"(?:{target})/(a|b)",))
