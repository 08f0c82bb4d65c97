"""Methods that quantise the kernels they target themselves: LoftQ, QA-LoRA, quantisation-aware training."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax

from lowrank import settings
from lowrank.errors import UserError, unknown
from lowrank.methods import targets
from lowrank.methods.lora import bind_dropout
from lowrank.methods.method import Method
from lowrank.weight import is_weight
from lowrank.weights import black_box, fake
from lowrank.weights import ir_qlora as ir_form
from lowrank.weights import loftq as loftq_form
from lowrank.weights import lora as lora_form
from lowrank.weights import qa_lora as qa_lora_form
from lowrank.weights.schemes import SCHEMES, Quantizer, compiled, group_of

LINEAR = r"(layers|top)/(attn|mlp)/(q|k|v|qkv|o|gate|up|down)/kernel"


def loftq(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    quantize: Mapping[str, Any] | str = "nf4",
    steps: int = 1,
    dropout: float = 0.0,
) -> Method:
    """LoftQ: LoRA on codes, both made so that together they start near W; see `lowrank.weights.loftq`.

    `quantize` is a scheme `{"name": "nf4", "block": 64, ...}` or its name, `steps` how often codes and factors are
    made anew. The base is read as it is: `model.quantize` would leave nothing to make up for.
    """
    targets.positive(rank=rank, alpha=alpha, steps=steps)
    targets.fraction(dropout=dropout)
    make = _quantizer(quantize)

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        del key
        targets.check_rank(name, w.shape, rank)
        _check_plain("LoftQ", name, w)
        return loftq_form.attach(w, rank=rank, scale=alpha / rank, steps=steps, dropout=dropout, quantize=make)

    # After several steps the codes depend on a decomposition's last places: the adapter holds them.
    holds = (rf"{target}/base/.*",) if steps > 1 else ()
    return Method(rewrite=((target, adapt),), bind=bind_dropout if dropout else None, holds=holds)


def qa_lora(rank: int = 8, alpha: float = 16.0, target: str = LINEAR, block: int = 64, bits: int = 4) -> Method:
    """QA-LoRA on asymmetric integer codes, which it merges into exactly; see `lowrank.weights.qa_lora`.

    `block` inputs share a scale, a zero and an update. A plain kernel is quantised to `bits`, codes are left as they
    are.
    """
    targets.positive(rank=rank, alpha=alpha)
    make = compiled(settings.call(SCHEMES["integer"], {"bits": bits, "block": block, "symmetric": False}, "method"))

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_kernel(name)
        _check_finite(name, w)
        if rank > min(-(-w.shape[-2] // block), w.shape[-1]):
            raise UserError(f"rank {rank} is larger than min(groups, out) of {name}, in groups of {block} inputs")
        return qa_lora_form.attach(key, w, rank=rank, alpha=alpha, block=block, quantize=make)

    return Method(rewrite=((target, adapt),))


def ir_qlora(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    block: int = 64,
    double: bool = True,
    calibrate: int = 200,
    dropout: float = 0.0,
) -> Method:
    """IR-QLoRA: NF4 calibrated to keep the most information, and a LoRA past which averages of its inputs flow.

    `calibrate` shifts of each block are tried; see `lowrank.weights.codebook` and `lowrank.weights.ir_qlora`. A base
    that is in codes already (`model.quantize`) is left as it is.
    """
    targets.positive(rank=rank, alpha=alpha)
    targets.fraction(dropout=dropout)
    make = _quantizer({"name": "nf4", "block": block, "double": double, "calibrate": calibrate})

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_rank(name, w.shape, rank)
        _check_finite(name, w)
        base = w if is_weight(w) else jax.lax.map(make, w) if len(w.shape) == 3 else make(w)
        return ir_form.attach(lora_form.attach_even(key, base, rank=rank, alpha=alpha, dropout=dropout))

    return Method(rewrite=((target, adapt),), bind=bind_dropout if dropout else None)


def modulora(
    quantizer: str = "lowrank.weights.black_box:absmax",
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    dropout: float = 0.0,
) -> Method:
    """ModuLoRA: LoRA on the codes of any quantiser, `quantizer='package.module:function'`.

    The function turns a kernel `[in, out]` into `(state, decode)`: arrays, and a function of module level from them
    to the kernel; see `lowrank.weights.black_box`.
    """
    targets.positive(rank=rank, alpha=alpha)
    targets.fraction(dropout=dropout)
    quantise = _imported(quantizer)

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_rank(name, w.shape, rank)
        _check_plain("ModuLoRA", name, w)
        base = black_box.attach(w, quantise, quantizer)
        return lora_form.attach_even(key, base, rank=rank, alpha=alpha, dropout=dropout)

    return Method(rewrite=((target, adapt),), bind=bind_dropout if dropout else None)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"method.quantizer {path!r} is not package.module:function: {e}") from None


def qat(target: str = LINEAR, quantize: Mapping[str, Any] | str = "int4", activations: int = 0) -> Method:
    """Quantisation-aware training of the targeted kernels; see `lowrank.weights.fake`.

    `quantize` is a scheme or its name; `activations` the bits that inputs are rounded to, 0 for none.
    """
    _quantizer(quantize)
    if activations and not 2 <= activations <= 8:
        raise UserError(f"method.activations must be 0 or 2 to 8 bits, not {activations}")
    group = group_of(quantize)
    scheme, options = group.pop("name"), tuple(sorted(group.items()))

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        del key
        targets.check_kernel(name)
        _check_plain("QAT", name, w)
        return fake.attach(w, scheme=scheme, options=options, activations=activations)

    return Method(rewrite=((target, adapt),))


def _quantizer(group: Mapping[str, Any] | str) -> Quantizer:
    options = group_of(group)
    name = options.pop("name", None)
    if name not in SCHEMES:
        raise unknown("method.quantize", name, SCHEMES)
    return compiled(settings.call(SCHEMES[name], options, "method.quantize"))


def _check_plain(method: str, name: str, w: Any) -> None:
    """Raises UserError for a kernel that is a form, or not finite."""
    if is_weight(w):
        raise UserError(f"{method} starts from a plain kernel; {name} is a {w.title}")
    _check_finite(name, w)


def _check_finite(name: str, w: Any) -> None:
    """Raises UserError for a kernel with NaN or infinite values; one that is only a shape passes."""
    if not is_weight(w) and not isinstance(w, jax.core.Tracer) and not jax.numpy.isfinite(w).all():
        raise UserError(f"{name} holds NaN or infinite values: it cannot be quantised")
