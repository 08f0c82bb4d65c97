"""Every fine-tuning method as a setting of four knobs. A new method is one function and one line in `METHODS`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank import settings, tree, weight
from lowrank.errors import UserError, unknown
from lowrank.weights import dora as dora_form
from lowrank.weights import lora as lora_form
from lowrank.weights import scaled as scaled_form

PyTree = Any
Bind = Callable[[PyTree, Any, jax.Array | None], PyTree]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method changes: which weights, which model options, which labels, what is shared at run time."""

    rewrite: tuple[tuple[str, weight.Rewrite], ...] = ()  # (regex over weight names, function), applied in order
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of the model's config
    train: tuple[str, ...] = ()  # regexes over leaf names, beside the fields that forms declare trainable
    bind: Bind | None = None  # (params, batch, rng or None) -> params, inside the loss
    by_layer: tuple[tuple[str, str], ...] = ()  # (target, pattern): every pattern must name a targeted layer


def build(group: Mapping[str, Any]) -> Method:
    """The method of a config group `{'name': 'lora', 'rank': 8, ...}`; UserError for an unknown name or key."""
    group = dict(group)
    name = group.pop("name", None)
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return settings.call(METHODS[name], group, "method")


def attach(method: Method, params: PyTree, key: jax.Array) -> PyTree:
    """`params` with the method's rewrites applied; every pattern must match, or UserError."""
    weights = tree.named_leaves(params, weight.is_weight)
    for target, pattern in method.by_layer:
        hits = tree.matching(target, [name for name, _ in weights], "target")
        layers = [n for name, w in weights if name in hits for n in _layer_names(name, w.shape)]
        tree.matching(pattern, layers, "rank or alpha pattern")
    return weight.rewrite(params, method.rewrite, key)


def matches(method: Method, params: PyTree) -> list[tuple[str, list[str]]]:
    """`[(pattern, weight or leaf names), ...]`: what each rule of the method matches in `params`."""
    weights, leaves = tree.names(params, weight.is_weight), tree.names(params)
    targets = [(p, tree.matching(p, weights, "target")) for p, _ in method.rewrite]
    return targets + [(p, tree.matching(p, leaves, "train pattern")) for p in method.train]


def full() -> Method:
    """Full fine-tuning: every parameter is trained."""
    return Method(train=(".*",))


def partial(layers: int = 2) -> Method:
    """Partial fine-tuning: the last `layers` blocks are trained; the backward pass stops below them."""
    if layers < 1:
        raise UserError(f"method.layers must be at least 1, not {layers}")
    return Method(model={"top_layers": layers}, train=("top/.*",))


def head() -> Method:
    """Linear probing: only the head is trained."""
    return Method(train=("head/.*",))


def bitfit() -> Method:
    """BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199)."""
    return Method(train=(r"(.*/)?bias",))


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = r".*attn/(q|v)/kernel",
    rslora: bool = False,
    dropout: float = 0.0,
    bias: str = "none",
    init: str = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoRA on the weights that `target` matches; see `lowrank.weights.lora` for the formula and the inits.

    `rslora` scales by alpha / sqrt(rank). `bias` trains no biases, `all`, or those of the targets (`lora_only`).
    The patterns map a regex over names with or without a layer's index (`layers/attn/q/kernel`,
    `layers/3/attn/q/kernel`) to that weight's rank or alpha; the last match wins; rank 0 leaves a layer alone.
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    _check_lora(rank, alpha, dropout, rank_pattern, alpha_pattern)
    biases = {"none": (), "all": (r"(.*/)?bias",), "lora_only": (re.sub(r"kernel$", "bias", target),)}
    if bias not in biases:
        raise unknown("LoRA bias", bias, biases)
    if init not in lora_form.INITS:
        raise unknown("LoRA init", init, lora_form.INITS)

    def adapt(key: jax.Array, w: Any, name: str) -> lora_form.LoRA:
        ranks = _per_layer(name, w.shape, rank, rank_pattern)
        _check_ranks(name, w.shape, ranks)
        alphas = _per_layer(name, w.shape, alpha, alpha_pattern)
        return lora_form.attach(key, w, ranks=ranks, alphas=alphas, rslora=rslora, dropout=dropout, init=init)

    return Method(
        rewrite=((target, adapt),),
        train=biases[bias],
        bind=_bind_dropout if dropout else None,
        by_layer=tuple((target, p) for p in (*rank_pattern, *alpha_pattern)),
    )


def dora(**kwargs: Any) -> Method:
    """DoRA: LoRA's options, with a learned magnitude for each output; see `lowrank.weights.dora`."""
    method = settings.call(lora, kwargs, "method")
    return dataclasses.replace(method, rewrite=tuple((p, _with_magnitude(fn)) for p, fn in method.rewrite))


def ia3(target: str = r".*attn/(k|v)/kernel", feedforward: str = r".*mlp/down/kernel") -> Method:
    """(IA)^3: rescales the outputs of `target` and the inputs of `feedforward` ('' for none)."""
    sides = ((target, "out"), (feedforward, "in"))
    return Method(rewrite=tuple((p, lambda key, w, name, s=side: scaled_form.attach(w, s)) for p, side in sides if p))


def prompt(length: int = 20) -> Method:
    """Prompt tuning: `length` virtual tokens before the text (Lester et al. 2021, arXiv:2104.08691)."""
    if length < 1:
        raise UserError(f"method.length must be at least 1, not {length}")
    return Method(model={"num_prompt": length}, train=("prompt/.*",))


METHODS: dict[str, Callable[..., Method]] = {
    "full": full,
    "partial": partial,
    "head": head,
    "bitfit": bitfit,
    "lora": lora,
    "dora": dora,
    "ia3": ia3,
    "prompt": prompt,
}


def _with_magnitude(fn: weight.Rewrite) -> weight.Rewrite:
    return lambda key, w, name: dora_form.attach(fn(key, w, name))


def _check_lora(rank: int, alpha: float, dropout: float, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    for where, value in [("rank", rank), *((f"rank_pattern[{k!r}]", v + 1) for k, v in ranks.items())]:
        if value < 1:
            raise UserError(f"method.{where} must be positive, not {value}")
    for where, value in [("alpha", alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in alphas.items())]:
        if value <= 0:
            raise UserError(f"method.{where} must be positive, not {value}")
    if not 0 <= dropout < 1:
        raise UserError(f"method.dropout must be in [0, 1), not {dropout}")


def _check_ranks(name: str, shape: tuple[int, ...], ranks: list[int]) -> None:
    if not name.endswith("kernel"):
        raise UserError(f"{name} is no kernel: only kernels [..., in, out] take a low-rank update")
    if max(ranks) > min(shape[-2:]):
        raise UserError(f"rank {max(ranks)} is larger than min(in, out) = {min(shape[-2:])} of {name}")
    if max(ranks) == 0:
        raise UserError(f"every layer of {name} has rank 0: leave it out of the target")


def _layer_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The weight's own name and, for a stack `[layers, in, out]`, one with each layer's index after the first part."""
    first, _, rest = name.partition("/")
    return [name] + ([f"{first}/{i}/{rest}" for i in range(shape[0])] if len(shape) == 3 else [])


def _per_layer(name: str, shape: tuple[int, ...], default: Any, patterns: Mapping[str, Any]) -> list[Any]:
    """One value for each layer of a stack (one in all if unstacked): the last matching pattern's, or the default."""

    def value(names: tuple[str, ...]) -> Any:
        hits = [v for p, v in patterns.items() if any(re.fullmatch(p, n) for n in names)]
        return hits[-1] if hits else default

    whole, *layers = _layer_names(name, shape)
    return [value((whole, layer)) for layer in layers] or [value((whole,))]


def _bind_dropout(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
    """Hands every weight with dropout its key for this step, one a layer; without an rng there is no dropout."""
    del batch
    if rng is None:
        return params

    def bound(name: str, w: Any) -> Any:
        if not getattr(w, "dropout", 0):
            return w
        key = weight.name_key(rng, name)
        stack = w.shape[:-2]
        return dataclasses.replace(w, key=jax.random.split(key, stack) if stack else key)

    return tree.map_named(bound, params, is_leaf=weight.is_weight)
