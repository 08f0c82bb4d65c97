"""EDoRA as a method: LoRA-XS with a learned magnitude per output."""

from typing import Any

from lowrank.methods.lora import lora
from lowrank.methods.lora_xs import around_core
from lowrank.methods.method import Method
from lowrank.methods.options import with_options_of
from lowrank.weights import lora_xs as form


@with_options_of(lora, without=("init",))
def edora(rank: int = 16, **kwargs: Any) -> Method:
    """EDoRA: LoRA-XS with a learned magnitude per output; see `lowrank.weights.lora_xs`.

    Takes the options of `lora` except `init`.
    """
    return around_core(form.attach_edora, rank, kwargs)
