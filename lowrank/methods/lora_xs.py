"""LoRA-XS as a method: LoRA with both factors frozen around a small core."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Export, Method
from lowrank.methods.options import with_options_of
from lowrank.weights import lora_xs as form
from lowrank.weights.lora import LoRA


@with_options_of(lora, without=("init",))
def lora_xs(rank: int = 16, **kwargs: Any) -> Method:
    """LoRA-XS: LoRA of which only an r x r core is trained; see `lowrank.weights.lora_xs`.

    Takes the options of `lora` except `init`.

    Differs from the paper: the core starts at 0, where the paper draws it with a standard deviation of 1e-5, so that
    the model starts unchanged; its gradient is not 0 there.
    """
    return around_core(form.attach, rank, kwargs)


def around_core(attach: Callable[[LoRA], LoRA], rank: int, kwargs: dict[str, Any]) -> Method:
    """LoRA whose weights `attach` turns into frozen factors around a core of `rank`. Raises UserError for an `init`."""
    if "init" in kwargs:
        raise UserError(
            "method.init: the factors of LoRA-XS and EDoRA are the base's singular vectors, so leave this option out"
        )
    method = config_schema.call_with_group(lora, {"rank": rank, **kwargs}, "method")
    [(target, adapt)] = method.rules
    around = ((target, lambda key, w, name: attach(adapt(key, w, name))),)
    # An adapter saves the singular vectors too: on another machine their signs may differ.
    return dataclasses.replace(method, rules=around, export=Export(frozen=(f"(?:{target})/(a|b)",)))
