import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import Weight, dot, materialize
from lowrank.models import DecoderConfig, build_model
from tests.support.close import assert_close, difference
from tests.support.tiny_models import LLAMA, SIZES
from tests.support.tiny_parameters import D, L, Q, attached, base


@pytest.mark.parametrize(
    ("group", "trained"),
    [
        ({"name": "full"}, tree.leaf_names(base())),
        ({"name": "head"}, ["head/kernel"]),
        ({"name": "chosen", "leaves": (Q, "head/.*")}, [Q, "head/kernel"]),
        (
            {"name": "sparse"},
            [f"layers/{m}/kernel/values" for m in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/down")],
        ),
        ({"name": "sparse", "target": Q, "choose": "fisher"}, [f"{Q}/values"]),
        ({"name": "bitfit"}, [n for n in tree.leaf_names(base()) if n.endswith("bias")]),
        ({"name": "lora"}, [f"layers/attn/{m}/kernel/{f}" for m in "qv" for f in "ab"]),
        ({"name": "lora", "target": Q, "bias": "lora_only"}, ["layers/attn/q/bias", f"{Q}/a", f"{Q}/b"]),
        ({"name": "dora", "target": Q}, [f"{Q}/{f}" for f in ("a", "b", "magnitude")]),
        ({"name": "lora_fa", "target": Q}, [f"{Q}/b"]),
        ({"name": "lora_fa"}, [f"layers/attn/{m}/kernel/b" for m in "qv"]),
        ({"name": "lora_xs", "target": Q, "rank": 4}, [f"{Q}/core"]),
        ({"name": "edora", "target": Q, "rank": 4}, [f"{Q}/core", f"{Q}/magnitude"]),
        ({"name": "intrinsic", "dim": 9}, ["shared/intrinsic"]),
        (
            {"name": "smore", "target": Q},
            [f"{Q}/{f}" for f in ("narrow", "up", "mixes/0")]
            + [f"{Q}/{f}/{i}" for f in ("hidden", "queries", "keys", "downs", "ups") for i in (0, 1)],
        ),
        ({"name": "more", "target": Q}, [f"{Q}/{f}" for f in ("a", "b", "router")]),
        ({"name": "intrinsic", "dim": 9, "said": True}, ["shared/intrinsic", "shared/said/layers"]),
        ({"name": "loha", "rank": 3, "target": Q}, [f"{Q}/{f}" for f in ("a1", "b1", "a2", "b2")]),
        ({"name": "adalora", "target": Q, "init_rank": 4, "target_rank": 2}, [f"{Q}/{f}" for f in ("a", "b", "e")]),
        ({"name": "bidora", "target": Q}, [f"{Q}/{f}" for f in ("a", "b", "magnitude")]),
        ({"name": "relora", "target": Q, "rank": 2}, [f"{Q}/a", f"{Q}/b"]),
        ({"name": "galore", "rank": 2, "target": Q}, tree.leaf_names(base())),
        ({"name": "lokr", "target": Q}, [f"{Q}/w1", f"{Q}/w2"]),
        ({"name": "lokr", "rank": 1, "target": Q}, [f"{Q}/{f}" for f in ("w1", "a2", "b2")]),
        (
            {"name": "lokr", "rank": 1, "factor": 4, "decompose_both": True, "target": Q},
            [f"{Q}/{f}" for f in ("a1", "b1", "w2")],
        ),
        ({"name": "hira", "rank": 3, "target": Q}, [f"{Q}/a", f"{Q}/b"]),
        ({"name": "vera", "target": Q}, [f"{Q}/lambda_b", f"{Q}/lambda_d"]),
        ({"name": "loftq", "rank": 3, "target": Q}, [f"{Q}/a", f"{Q}/b"]),
        ({"name": "qa_lora", "rank": 2, "block": 4, "target": Q}, [f"{Q}/a", f"{Q}/b"]),
        ({"name": "ir_qlora", "target": Q, "calibrate": 3}, [f"{Q}/{f}" for f in ("a", "b", "beta1", "beta2")]),
        ({"name": "modulora", "target": Q}, [f"{Q}/a", f"{Q}/b"]),
        ({"name": "qat", "target": Q}, [f"{Q}/latent"]),
        ({"name": "oft", "block": 4, "target": Q}, [f"{Q}/skew"]),
        ({"name": "boft", "block": 2, "target": Q}, [f"{Q}/s", f"{Q}/skew"]),
        ({"name": "ia3"}, [f"layers/{m}/kernel/s" for m in ("attn/k", "attn/v", "mlp/down")]),
    ],
)
def test_a_method_trains_exactly_what_it_names(group, trained):
    assert sorted(attached(**group)[1]) == sorted(trained)


def test_longlora_trains_norms_and_embeddings_beside_its_lora():
    model = build_model(DecoderConfig(**SIZES, **LLAMA))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    method = methods.build_method({"name": "longlora", "rank": 2, "target": Q, "group": 8})
    adapted = jax.eval_shape(lambda p: methods.attach(method, p, jax.random.key(1)), shapes)
    trained = [name for name, learns in tree.named_leaves(methods.trainable_mask(method, adapted)) if learns]
    norms = [f"{name}/scale" for name in ("layers/attn_norm", "layers/mlp_norm", "norm")]
    assert sorted(trained) == sorted([f"{Q}/a", f"{Q}/b", "embed/embedding", *norms])
    assert method.model_options == {"shift_group": 8}


def test_model_options_come_with_their_labels():
    assert methods.build_method({"name": "prompt", "length": 5}).model_options == {"num_prompt": 5}
    assert methods.build_method({"name": "partial", "layers": 1}).trainable == ("top/.*",)


LAYER = [f"layers/{n}/kernel" for n in (*(f"attn/{m}" for m in "qkvo"), "mlp/gate", "mlp/up", "mlp/down")]
PROMPT_MLP = [
    "shared/prompt/embedding",
    *(f"shared/prompt/{n}/{f}" for n in ("in", "mid", "out") for f in ("bias", "kernel")),
]
PREFIX_MLP = [f"shared/prefix/{n}" for n in ("embedding", "in/bias", "in/kernel", "out/bias", "out/kernel")]
BLOCK_NORMS = [f"layers/{s}_norm/scale" for s in ("attn", "mlp")]


def adapters(*sublayers):
    return [f"layers/{s}_adapter/{n}/{f}" for s in sublayers for n in ("down", "up") for f in ("kernel", "bias")]


@pytest.mark.parametrize(
    ("group", "trained"),
    [
        ({"name": "prompt", "length": 2}, ["prompt/embedding"]),
        ({"name": "prompt", "length": 2, "init": "vocabulary"}, ["prompt/embedding"]),
        ({"name": "norm"}, [*BLOCK_NORMS, "norm/scale"]),
        ({"name": "tokens", "tokens": (3, -1)}, ["embed/embedding/rows"]),
        ({"name": "features"}, ["head/kernel"]),
        ({"name": "pfeiffer", "also_train": "norm/.*"}, [*adapters("mlp"), "norm/scale"]),
        ({"name": "partial", "layers": 1, "first": True}, [*LAYER, *BLOCK_NORMS]),
        ({"name": "ptuning", "length": 2}, PROMPT_MLP),
        ({"name": "prefix", "length": 2}, ["prefix/k", "prefix/v"]),
        ({"name": "prefix", "length": 2, "reparam": True}, PREFIX_MLP),
        ({"name": "mam", "length": 2}, ["prefix/k", "prefix/v", *adapters("mlp")]),
        ({"name": "houlsby"}, [*adapters("attn", "mlp"), *BLOCK_NORMS]),
        ({"name": "houlsby", "norms": False}, adapters("attn", "mlp")),
        ({"name": "pfeiffer"}, adapters("mlp")),
        ({"name": "parallel", "after": "attn"}, adapters("attn")),
        ({"name": "scaled_parallel"}, adapters("mlp")),
    ],
)
def test_a_method_trains_exactly_what_it_adds_to_a_model(group, trained):
    method = methods.build_method(group)
    model = build_model(DecoderConfig(**{**SIZES, **LLAMA, **method.model_options}))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"])
    shapes = jax.eval_shape(lambda p: methods.attach(method, p, jax.random.key(1)), params)
    mask = methods.trainable_mask(method, shapes)
    assert sorted(n for n, learns in tree.named_leaves(mask) if learns) == sorted(trained)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora, expected):
    params, _ = attached(name="lora", rank=4, alpha=16, rslora=rslora)
    assert_close(params["layers"]["attn"]["q"]["kernel"].scale, [expected] * L)


def test_patterns_set_rank_and_alpha_by_module_and_by_layer():
    patterns = {"rank_pattern": {Q: 2, r"layers/1/attn/q/kernel": 5}, "alpha_pattern": {r"layers/2/.*": 3.0}}
    params, _ = attached(name="lora", rank=4, alpha=16, **patterns)
    q, v = params["layers"]["attn"]["q"]["kernel"], params["layers"]["attn"]["v"]["kernel"]
    assert q.a.shape == (L, D, 5)
    assert v.a.shape == (L, D, 4)
    assert np.any(q.a != 0, axis=1).sum(-1).tolist() == [2, 5, 2]
    assert_close(q.scale, [16 / 2, 16 / 5, 3 / 2])


def test_the_padding_of_a_smaller_rank_gets_no_gradient():
    params, _ = attached(name="lora", rank=4, target=Q, rank_pattern={r"layers/1/.*": 2}, init="zero_a")
    w = params["layers"]["attn"]["q"]["kernel"]
    layer = jax.tree.map(lambda leaf: leaf[1], w)
    x = jax.random.normal(jax.random.key(2), (6, D))
    grads = jax.grad(lambda w: jnp.sum(jnp.sin(dot(x, w))))(layer)
    assert np.any(grads.a[:, :2])
    assert not np.any(grads.a[:, 2:])
    assert not np.any(grads.b[2:])


def test_pissa_holds_the_leading_singular_values():
    params, _ = attached(name="lora", rank=2, init="pissa", target=Q)
    w, kernel = params["layers"]["attn"]["q"]["kernel"], np.asarray(base()["layers"]["attn"]["q"]["kernel"], np.float64)
    u, s, v = np.linalg.svd(kernel)
    leading = np.einsum("lir,lr,lro->lio", u[:, :, :2], s[:, :2], v[:, :2])
    assert_close(w.delta(), leading, relative=1e-5)
    assert_close(w.base, kernel - leading, relative=2e-5)


def test_olora_takes_the_qr_factors_of_the_papers_kernel():
    params, _ = attached(name="lora", rank=3, alpha=6, init="olora", target=Q)
    w, kernel = params["layers"]["attn"]["q"]["kernel"], np.asarray(base()["layers"]["attn"]["q"]["kernel"], np.float64)
    for layer in range(L):
        q, r = np.linalg.qr(kernel[layer].T)
        update = 2.0 * (q[:, :3] @ r[:3]).T
        assert_close(w.delta()[layer], update)
        assert_close(w.base[layer], kernel[layer] - update)
        assert_close(w.b[layer] @ w.b[layer].T, np.eye(3))


@pytest.mark.parametrize(("name", "fields"), [("lora_fa", "ab"), ("lora_xs", ("a", "b", "core"))])
def test_an_adapter_holds_the_factors_that_were_frozen(name, fields):
    method = methods.build_method({"name": name, "rank": 4, "target": Q})
    params = methods.attach(method, base(), jax.random.key(1))
    _, mask = methods.exported_leaves(method, params, methods.trainable_mask(method, params))
    assert [name for name, held in tree.named_leaves(mask) if held] == [f"{Q}/{f}" for f in fields]


@pytest.mark.parametrize("name", ["lora_xs", "edora"])
def test_a_core_is_trained_between_the_leading_singular_vectors(name):
    params, _ = attached(name=name, rank=3, alpha=6, target=Q)
    stack = params["layers"]["attn"]["q"]["kernel"]
    core = np.random.default_rng(0).standard_normal((3, 3))
    kernel = np.asarray(base()["layers"]["attn"]["q"]["kernel"][1], np.float64)
    u, s, v = np.linalg.svd(kernel)
    w = dataclasses.replace(jax.tree.map(lambda leaf: leaf[1], stack), core=jnp.asarray(core, jnp.float32))
    assert_close(np.abs(w.a), np.abs(u[:, :3] * s[:3]), relative=1e-5)  # to signs, which the core absorbs
    signs = np.sign(np.sum(np.asarray(w.b) * v[:3], axis=1))
    expected = kernel + 2.0 * (u[:, :3] * s[:3] * signs) @ core @ (signs[:, None] * v[:3])
    if name == "edora":
        expected *= np.linalg.norm(kernel, axis=0) / np.linalg.norm(expected, axis=0)
    assert_close(materialize(w), expected, relative=1e-5)


@pytest.mark.parametrize(
    ("group", "what"),
    [
        ({"name": "lora", "init": "olora"}, "OLoRA"),
        ({"name": "relora"}, "ReLoRA"),
        ({"name": "galore", "rank": 2}, "GaLore"),
    ],
)
def test_what_decomposes_or_changes_a_base_asks_for_a_plain_one(group, what):
    scaled = methods.attach(
        methods.build_method({"name": "ia3", "target": Q, "feedforward": ""}), base(), jax.random.key(0)
    )
    with pytest.raises(UserError, match=f"{what} decomposes a plain kernel, not a Scaled"):
        methods.attach(methods.build_method({**group, "target": Q}), scaled, jax.random.key(0))


def test_dora_keeps_the_formula_of_the_paper_in_float64():
    params, _ = attached(name="dora", rank=2, init="zero_a", target=Q)
    w = jax.tree.map(lambda leaf: leaf[0], params["layers"]["attn"]["q"]["kernel"])
    w = w.__class__(**{**vars(w), "a": w.a + 0.5, "magnitude": w.magnitude * 1.5})
    base_, a, b, m = (np.asarray(t, np.float64) for t in (w.base, w.a, w.b, w.magnitude))
    direction = base_ + float(w.scale) * a @ b
    expected = m * direction / np.linalg.norm(direction, axis=0)
    assert_close(materialize(w), expected)
    assert_close(dot(jnp.eye(D), w), expected)


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16])
def test_dora_makes_nothing_of_the_kernels_size_forward_or_back(base):
    def made(dot_of):
        def loss(trained, x, w):
            return jnp.sum(jnp.square(dot_of(dataclasses.replace(w, **trained), x)))

        trained = {field: getattr(w, field) for field in ("a", "b", "magnitude")}
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(trained, jnp.ones((5, 24), base), w)
        return re.findall(r"(?:->|:) tensor<(?:24x40|40x24)x(?:bf16|f32)>$", program.as_text(), re.MULTILINE)

    method = methods.build_method({"name": "dora", "rank": 2, "target": "kernel"})
    w = methods.attach(method, {"kernel": jnp.ones((24, 40), base)}, jax.random.key(0))["kernel"]
    assert not made(lambda w, x: w.dot(x))
    assert made(lambda w, x: Weight.dot_to_float32(w, x))


def test_the_column_norm_on_a_bfloat16_base_is_float32s():
    method = methods.build_method({"name": "dora", "rank": 4, "target": "kernel"})
    kernel = jax.random.normal(jax.random.key(0), (256, 64)).astype(jnp.bfloat16)
    w = methods.attach(method, {"kernel": kernel}, jax.random.key(1))["kernel"]
    w = dataclasses.replace(w, b=jax.random.normal(jax.random.key(2), w.b.shape))
    base, a, b = (np.asarray(x, np.float64) for x in (w.base, w.a, w.b))
    expected = np.linalg.norm(base + float(w.scale) * a @ b, axis=0)
    assert_close(jax.jit(type(w).column_norm)(w), expected)


def test_dropout_follows_its_key_and_is_off_without_one():
    method = methods.build_method({"name": "lora", "dropout": 0.5, "init": "zero_a", "target": Q})
    params = methods.attach(method, base(), jax.random.key(1))
    w = params["layers"]["attn"]["q"]["kernel"]
    assert methods.build_method({"name": "lora"}).bind is None
    assert method.bind(params, None, None) is params
    bound = method.bind(params, None, jax.random.key(5))["layers"]["attn"]["q"]["kernel"]
    bound = bound.__class__(**{**vars(bound), "a": w.a + 1.0})
    x = jnp.ones((64, D))
    outputs = jax.lax.scan(lambda _, w: (None, dot(x, w)), None, bound)[1] - x @ materialize(w)
    assert difference(outputs[0][:1], outputs[0]) > 1e-3  # rows differ: each element is dropped on its own
    mean = jnp.mean(outputs, axis=1)
    assert_close(mean, jnp.mean(x[:1] @ (bound.delta()), axis=1), relative=0.3)


def test_one_rule_more_leaves_the_other_initial_values_alone():
    one, _ = attached(name="lora", target=Q)
    two, _ = attached(name="lora", target=r".*(q|v)/kernel")
    q = lambda p: p["layers"]["attn"]["q"]["kernel"].a  # noqa: E731
    np.testing.assert_array_equal(q(one), q(two))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "lara"}, r"unknown method 'lara' \(did you mean 'lora'\?\)"),
        ({"name": "lora", "rnak": 4}, r"'method.rnak' \(did you mean 'method.rank'\?\)"),
        ({"name": "dora", "rnak": 4}, r"'method.rnak' \(did you mean 'method.rank'\?\)"),
        ({"name": "lora", "rank": 0}, "method.rank must be positive, not 0"),
        ({"name": "lora", "rank": D + 1}, r"rank 9 is larger than min\(in, out\) = 8 of layers/attn/q/kernel"),
        ({"name": "lora", "alpha": 0}, "method.alpha must be positive, not 0"),
        ({"name": "lora", "alpha_pattern": {".*": -1}}, r"alpha_pattern\['\.\*'\] must be positive"),
        ({"name": "lora", "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"name": "lora", "bias": "some"}, "unknown LoRA bias 'some'"),
        ({"name": "lora", "init": "pisa"}, r"unknown LoRA init 'pisa' \(did you mean 'pissa'\?\)"),
        ({"name": "lora", "target": ".*atn/q/kernel"}, r"target .* matches no leaf \(did you mean"),
        ({"name": "lora", "target": ".*bias"}, "only kernels"),
        ({"name": "lora", "rank_pattern": {"layers/9/.*": 2}}, "rank or alpha pattern 'layers/9/.*' matches no leaf"),
        ({"name": "lora_fa", "init": "zero_a"}, "would leave LoRA-FA without a gradient"),
        ({"name": "lora_fa", "also_train": f"{Q}/a"}, rf"{Q}/a is claimed by '{Q}/a', .* and by '\(\?:.*', to be kept"),
        (
            {"name": "lora", "also_train": f"{Q}/base"},
            rf"train pattern .* matches {Q}/base, which its form keeps frozen",
        ),
        ({"name": "ia3", "target": ".*/kernel"}, "layers/mlp/down/kernel is claimed by two rules .* and '.*mlp/down"),
        ({"name": "lora_xs", "init": "pissa"}, "method.init: the factors of LoRA-XS and EDoRA"),
        ({"name": "edora", "rnak": 3}, r"'method.rnak' \(did you mean 'method.rank'\?\)"),
        ({"name": "adalora", "target_rank": 13}, "method.target_rank 13 is above method.init_rank 12"),
        ({"name": "adalora"}, r"rank 12 is larger than min\(in, out\) = 8"),
        ({"name": "adalora", "tinit": -1.0}, "method.tinit must not be negative"),
        ({"name": "adalora", "beta1": 1.0}, r"method.beta1 must be in \[0, 1\)"),
        ({"name": "longlora", "factor": 0.5}, "method.factor must be at least 1, not 0.5"),
        ({"name": "longlora", "group": 5}, "method.group must be a positive even number of tokens, not 5"),
        ({"name": "partial", "layers": 0}, "at least 1"),
        ({"name": "chosen", "leaves": ""}, "method.leaves is empty"),
        ({"name": "chosen", "leaves": "layers/atn/.*"}, "matches no leaf .did you mean"),
        ({"name": "sparse", "density": 0.0}, r"method.density must be in \(0, 1\], not 0.0"),
        ({"name": "sparse", "choose": "fischer"}, "did you mean 'fisher'"),
        ({"name": "sparse", "batches": 0}, "method.batches must be positive"),
        ({"name": "sparse", "target": ".*bias"}, "only kernels"),
        ({"name": "tokens", "tokens": ()}, "method.tokens is empty"),
        ({"name": "tokens", "tokens": (1, 1)}, "names 1 twice"),
        ({"name": "prompt", "length": 0}, "at least 1"),
        ({"name": "prefix", "length": 0}, "method.length must be positive"),
        ({"name": "houlsby", "width": 0}, "method.width must be positive"),
        ({"name": "scaled_parallel", "scale": 0.0}, "method.scale must be positive"),
        ({"name": "parallel", "after": "mpl"}, "unknown place in method.after 'mpl' .did you mean 'mlp'"),
        ({"name": "smore", "fanout": (2,)}, "method.experts has 2 levels and method.fanout 1"),
        ({"name": "smore", "fanout": (5, 2)}, r"method.fanout=5 is not in 1\.\.4"),
        ({"name": "smore", "activation": "tahn"}, r"unknown S'MoRE activation 'tahn' \(did you mean 'tanh'"),
        ({"name": "more", "rank": 0}, "method.rank must be positive"),
        ({"name": "more", "per_token": 5}, r"method.per_token=5 is not in 1\.\.4"),
        ({"name": "more", "balance": -1.0}, "method.balance must not be negative"),
        ({"name": "milora", "per_prompt": 0}, r"method.per_prompt must be positive, not 0"),
        ({"name": "milora", "per_prompt": 3, "target": Q}, r"method.per_prompt=3 exceeds .*: 1\.\.1 of them"),
        ({"name": "milora", "per_prompt": 1, "target": "head/kernel"}, "head/kernel is not in a stack of layers"),
        ({"name": "intrinsic", "dim": 0}, "method.dim must be at least 1, not 0"),
        ({"name": "intrinsic", "dim": 193, "target": Q}, "method.dim=193 is larger than the 192 parameters"),
        ({"name": "intrinsic", "dim": L, "said": True}, "leaves no vector beside SAID's 3 scales"),
        ({"name": "intrinsic", "projection": "fastfod"}, r"'fastfod' \(did you mean 'fastfood'"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)


def test_docstrings_say_in_one_form_how_methods_differ_from_their_papers():
    for name, make in methods.METHODS.items():
        found = re.findall("(?i)differs? from", inspect.getdoc(make))
        last = inspect.getdoc(make).split("\n\n")[-1]
        assert len(found) == last.startswith("Differs from the paper: "), name
