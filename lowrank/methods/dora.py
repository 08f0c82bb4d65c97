"""DoRA as a method: LoRA with a learned magnitude per output."""

import dataclasses
from typing import Any

from lowrank.core import config_schema, weight
from lowrank.methods.lora import lora
from lowrank.methods.method import Method
from lowrank.methods.options import with_options_of
from lowrank.weights import dora as form


@with_options_of(lora)
def dora(**kwargs: Any) -> Method:
    """DoRA: LoRA with a learned magnitude per output; see `lowrank.weights.dora`. Takes the options of `lora`.

    Differs from the paper: only the input of A is dropped out. The authors' code drops out the input of W too, in the
    term `(magnitude / norm - 1) x W`.
    """
    method = config_schema.call_with_group(lora, kwargs, "method")
    return dataclasses.replace(method, rules=tuple((p, _with_magnitude(fn)) for p, fn in method.rules))


def _with_magnitude(fn: weight.Rewrite) -> weight.Rewrite:
    return lambda key, w, name: form.attach(fn(key, w, name))
