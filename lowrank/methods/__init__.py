"""Fine-tuning methods: each is a function from options to a `Method`. A new method is one file and one line here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import unknown
from lowrank.methods.adalora import adalora
from lowrank.methods.attachment import attach, attach_for_loading, exported_leaves, matches, trainable_mask
from lowrank.methods.bidora import bidora
from lowrank.methods.bitfit import bitfit
from lowrank.methods.boft import boft
from lowrank.methods.chosen import chosen
from lowrank.methods.dora import dora
from lowrank.methods.edora import edora
from lowrank.methods.esft import esft
from lowrank.methods.features import features
from lowrank.methods.full import full
from lowrank.methods.galore import galore
from lowrank.methods.head import head
from lowrank.methods.hira import hira
from lowrank.methods.houlsby import houlsby
from lowrank.methods.ia3 import ia3
from lowrank.methods.intrinsic import intrinsic
from lowrank.methods.ir_qlora import ir_qlora
from lowrank.methods.loftq import loftq
from lowrank.methods.loha import loha
from lowrank.methods.lokr import lokr
from lowrank.methods.longlora import longlora
from lowrank.methods.lora import lora
from lowrank.methods.lora_fa import lora_fa
from lowrank.methods.lora_xs import lora_xs
from lowrank.methods.mam import mam
from lowrank.methods.method import SHARED, Context, EveryNSteps, Export, Hooks, Method
from lowrank.methods.milora import milora
from lowrank.methods.modulora import modulora
from lowrank.methods.more import more
from lowrank.methods.norm import norm
from lowrank.methods.oft import oft
from lowrank.methods.options import common_options
from lowrank.methods.parallel import parallel
from lowrank.methods.partial import partial
from lowrank.methods.perft import perft
from lowrank.methods.pfeiffer import pfeiffer
from lowrank.methods.prefix import prefix
from lowrank.methods.prompt import prompt
from lowrank.methods.ptuning import ptuning
from lowrank.methods.qa_lora import qa_lora
from lowrank.methods.qat import qat
from lowrank.methods.relora import relora
from lowrank.methods.scaled_parallel import scaled_parallel
from lowrank.methods.smore import smore
from lowrank.methods.sparse import sparse
from lowrank.methods.tokens import tokens, with_tokens
from lowrank.methods.vera import vera

METHODS: dict[str, Callable[..., Method]] = {
    "full": full,
    "partial": partial,
    "head": head,
    "features": features,
    "bitfit": bitfit,
    "norm": norm,
    "chosen": chosen,
    "sparse": sparse,
    "tokens": tokens,
    "lora": lora,
    "dora": dora,
    "lora_fa": lora_fa,
    "lora_xs": lora_xs,
    "edora": edora,
    "adalora": adalora,
    "bidora": bidora,
    "relora": relora,
    "longlora": longlora,
    "galore": galore,
    "ia3": ia3,
    "prompt": prompt,
    "ptuning": ptuning,
    "prefix": prefix,
    "mam": mam,
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "parallel": parallel,
    "scaled_parallel": scaled_parallel,
    "intrinsic": intrinsic,
    "more": more,
    "milora": milora,
    "smore": smore,
    "perft": perft,
    "esft": esft,
    "loha": loha,
    "lokr": lokr,
    "loftq": loftq,
    "modulora": modulora,
    "ir_qlora": ir_qlora,
    "qa_lora": qa_lora,
    "qat": qat,
    "hira": hira,
    "vera": vera,
    "oft": oft,
    "boft": boft,
}

ALSO = ("also_train", "also_tokens")  # options beside those of the method itself


def build_method(group: Mapping[str, Any]) -> Method:
    """The method of a config group `{'name': 'lora', 'rank': 8, ...}`.

    Every method takes two further options: `also_train`, one regex or several, adds leaves that are trained whole
    (PEFT's modules_to_save); `also_tokens` adds tokens whose embeddings are trained (PEFT's trainable_token_indices;
    see `tokens`). Raises UserError for an unknown name or key.
    """
    group = dict(group)
    name = group.pop("name", None)
    also: dict[str, Any] = {k: group.pop(k) for k in ALSO if k in group}
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return config_schema.call_with_group(
        functools.partial(_with_also, config_schema.call_with_group(METHODS[name], group, "method")), also, "method"
    )


def shared_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The `options` of some method that the method `name` has too, with the same meaning; none for an unknown name."""
    if name not in METHODS:
        return {}
    names = {*common_options(METHODS[name]), *ALSO}
    return {key: value for key, value in options.items() if key in names}


def _with_also(
    method: Method, also_train: str | Sequence[str] = (), also_tokens: int | str | Sequence[int | str] = ()
) -> Method:
    also = (also_train,) if isinstance(also_train, str) else tuple(also_train)
    method = with_tokens(method, also_tokens) if also_tokens != () else method
    return dataclasses.replace(method, trainable=(*method.trainable, *also)) if also else method


__all__ = [
    "METHODS",
    "SHARED",
    "Context",
    "EveryNSteps",
    "Export",
    "Hooks",
    "Method",
    "attach",
    "attach_for_loading",
    "build_method",
    "exported_leaves",
    "matches",
    "shared_options",
    "trainable_mask",
]
