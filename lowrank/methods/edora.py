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

    Differs from the paper: the core starts at 0, where the authors' code draws it with a standard deviation of 1e-5, so
    that the model starts unchanged; its gradient is not 0 there. Only the input of A is dropped out, as in `dora`.
    """
    return around_core(form.attach_edora, rank, kwargs)
