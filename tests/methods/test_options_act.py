"""Every option of every method changes the run, or is refused."""

import dataclasses
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo
from lowrank.methods import METHODS
from lowrank.models import DecoderConfig, build_model
from lowrank.training.optimizer import OptimConfig, build_optimizer
from tests.support import golden_cases
from tests.support.adapted_model import adapted
from tests.support.close import difference
from tests.support.thinning import keep
from tests.support.tiny_models import LLAMA, MOE, SIZES, decoder, run, tokens

Q, STEPS = "layers/attn/q/kernel", 10
EXPERTS = {
    "perft": {**golden_cases.EXPERT_METHODS["perft"]},
    "esft": {**golden_cases.EXPERT_METHODS["esft"], "target": "layers/mlp/experts/(gate|up)/kernel"},
}
# Another value of each option, or a list of several, by its name or by the name of the method and the option.
OTHER = {
    "activation": "silu",
    "smore/activation": "relu",
    "activations": 4,
    "after": ["attn", "mlp"],
    "alpha": 5.0,
    "alpha_pattern": {Q: 3.0},
    "balance": 0.5,
    "batches": 3,
    "beta1": 0.5,
    "beta2": 0.5,
    "bias": ["all", "none"],
    "bits": 4,
    "block": 2,
    "ir_qlora/block": 8,
    "qa_lora/block": 8,
    "calibrate": 3,
    "capacity": 0.75,
    "capacity_factor": 2.0,
    "choose": "random",
    "d_initial": 0.3,
    "deltaT": 2,
    "density": 0.3,
    "dim": 40,
    "dropout": 0.5,
    "encoder": ["mlp", "lstm"],
    "every": 2,
    "experts": 4,
    "smore/experts": (2, 2),
    "factor": 4,
    "longlora/factor": 3.0,
    "factors": 1,
    "fanout": (1, 2),
    "feedforward": ".*mlp/up/kernel",
    "gate": 3,
    "group": 8,
    "hidden": 6,
    "holdout": 0.4,
    "init": "zero_a",
    "prompt/init": ["random", "vocabulary"],
    "init_rank": 5,
    "layers": 2,
    "leaves": ".*mlp/up/kernel",
    "length": 3,
    "orthogonal": 0.5,
    "per_prompt": 2,
    "per_token": 1,
    "projection": ["dense", "sparse"],
    "prune": 0.5,
    "quantize": "int8",
    "quantizer": "tests.methods.test_options_act:halves",
    "rank": 3,
    "rank_pattern": {Q: 1},
    "retrain": 0.5,
    "scale": 3.0,
    "score": "token",
    "scope": "model",
    "seed": 3,
    "esft/share": 0.8,
    "steps": 2,
    "target": Q,
    "milora/target": "layers/attn/(q|k|v|o)/kernel",
    "esft/target": "layers/mlp/experts/down/kernel",
    "target_rank": 1,
    "terms": 5,
    "text": "the cat",
    "tfinal": 0.2,
    "tinit": 0.2,
    "tokens": (3, 4),
    "train": "layers/.*",
    "vera/rank": 16,
    "warm_lr": 0.1,
    "warmup": 0.5,
    "width": 6,
}


def halves(w):
    """A quantizer: `(W / 2, decode)`."""
    return w / 2, _doubled


def _doubled(half):
    return 2 * half


def effect(group):
    """Everything that a method does to a run, as one string: its knobs, and the program of its loss with gradients."""
    method = methods.build_method(group)
    kind = MOE if _has_experts(group) else LLAMA
    network = build_model(DecoderConfig(**{**SIZES, **kind, "qkv_bias": True, **method.model_options}))
    ids = jnp.zeros((2, 12), jnp.int32)

    def attached(key):
        return methods.attach(method, network.init(key, ids)["params"], key)

    mask = methods.trainable_mask(method, jax.eval_shape(attached, jax.random.key(0)))

    def value(key):
        params = attached(key)
        bound = method.bind(params, BatchInfo(ids + 1, prompt=ids > 0), key) if method.bind else params
        return params, network.apply({"params": bound}, ids)

    program = jax.make_jaxpr(value)(jax.random.key(0))
    knobs = dataclasses.replace(method, rules=tuple(pattern for pattern, _ in method.rules))
    return "\n".join([str(program), *map(repr, program.consts), str(mask), _spell(knobs)])


def _has_experts(group):
    return "experts" in group.get("target", "") or group["name"] in EXPERTS


def _spell(x):
    """A value with the values that its functions close over."""
    if isinstance(x, functools.partial):
        return f"{_spell(x.func)}({_spell(x.args)}, {_spell(x.keywords)})"
    if isinstance(x, types.FunctionType):
        cells = [_spell(c.cell_contents) for c in x.__closure__ or () if c.cell_contents is not x]
        return f"{x.__qualname__}[{cells}]"
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return f"{type(x).__name__}({_spell({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})})"
    if isinstance(x, dict):
        return str({k: _spell(v) for k, v in x.items()})
    if isinstance(x, tuple | list):
        return str([_spell(v) for v in x])
    return repr(x)


GROUPS = {**golden_cases.METHODS, **golden_cases.SETTINGS, **EXPERTS}
GROUPS |= {"mam-direct": {"length": 4, "width": 4}, "sparse-fisher": {"density": 0.1, "choose": "fisher"}}


@pytest.mark.parametrize("case", keep(GROUPS, ["lora", "mam-direct", "prefix", "sparse-magnitude"]))
def test_every_option_of_a_method_acts_or_is_refused(case):
    name = case.partition("-")[0]
    group = {"name": name, **GROUPS[case]}
    base, idle = effect(group), []
    parameters = inspect.signature(METHODS[name]).parameters.values()
    for option, default in [(p.name, p.default) for p in parameters if p.kind != p.VAR_KEYWORD]:
        value = group.get(option, default)
        other = not value if isinstance(value, bool) else OTHER.get(f"{name}/{option}", OTHER.get(option))
        other = next(x for x in other if x != value) if isinstance(other, list) else other
        assert other != value, option
        changed = outcome({**group, option: other})
        if changed == base or (isinstance(changed, UserError) and f"method.{option}" not in str(changed)):
            idle.append((option, changed))
    assert not idle


def outcome(group):
    """The effect of a group, or the error that refuses it."""
    try:
        return effect(group)
    except UserError as error:
        return error


DROPOUTS = [name for name, method in METHODS.items() if "dropout" in inspect.signature(method).parameters]


@pytest.mark.parametrize("target", ["layers/attn/(q|v)/kernel", "layers/mlp/experts/(up|down)/kernel"])
@pytest.mark.parametrize("name", keep(DROPOUTS, []))
def test_dropout_drops_or_is_refused(name, target):
    group = {"name": name, **GROUPS[name], "target": target}
    method = methods.build_method({**group, "dropout": 0.5})
    network, params = decoder("moe", **method.model_options)
    trained = _adapted_or_error(params, {**group, "dropout": 0.5})
    if isinstance(trained, UserError):
        assert "dropout" in str(trained)
        return
    ids = tokens(2)
    kept, dropped = (method.bind(trained, None, rng) for rng in (None, jax.random.key(0)))
    assert difference(run(network, dropped, ids), run(network, kept, ids)) > 1e-3


def _adapted_or_error(params, group):
    try:
        return adapted(params, group)[0]
    except UserError as error:
        return error


# Vectors alone are trained, and of embeddings `optim.no_decay` says that they do not decay.
UNDECAYED = ("bitfit", "ia3", "intrinsic", "norm", "prompt", "tokens", "vera")


@pytest.mark.parametrize("case", keep(GROUPS, ["bidora", "ia3"]))
def test_decay_moves_what_is_trained_or_is_refused(case):
    name = case.partition("-")[0]
    group = {"name": name, **GROUPS[case]}
    method = methods.build_method(group)
    _, params = decoder("moe" if _has_experts(group) else "llama", qkv_bias=True, **method.model_options)
    params = methods.attach(method, params, jax.random.key(0))
    trained = tree.split(params, methods.trainable_mask(method, params))[0]
    trained, zeros = (jax.tree.map(lambda x, to=to: jnp.full_like(x, to), trained) for to in (0.5, 0.0))
    build = functools.partial(build_optimizer, OptimConfig(weight_decay=0.1), STEPS, trained, method.hooks.rescaling)
    if name in UNDECAYED:
        with pytest.raises(UserError, match=r"optim\.weight_decay=0\.1 acts on none"):
            build()
        return
    optimizer = method.hooks.optimizer(build(), STEPS) if method.hooks.optimizer else build()
    state = optimizer.init(trained)
    updates, _ = optimizer.update(zeros, state, trained, lr=jnp.float32(0.1), gradient_at=lambda _: zeros)
    assert any(np.any(x) for x in jax.tree.leaves(updates))
