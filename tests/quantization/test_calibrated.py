"""GPTQ and AWQ against float64 written from the papers, layers called one by one, and what bad input gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import data, pretrained, quantization
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight, materialize
from lowrank.models.layers import Norm
from lowrank.quantization import awq, gptq
from lowrank.quantization.layer_runner import LayerRunner
from lowrank.weights.quantized.input_scaled import InputScaled
from lowrank.weights.quantized.schemes import SCHEMES, integer
from tests.support import tiny_models as models
from tests.support.close import assert_close

N, IN, OUT = 96, 24, 10
values = jax.jit(materialize)


@pytest.fixture(scope="module")
def problem():
    """Correlated inputs `[N, IN]` of unequal size, one of them never but 0, and a kernel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 6)) @ rng.normal(size=(6, IN)) + 0.3 * rng.normal(size=(N, IN))
    x = x * np.exp(rng.normal(size=IN))
    x[:, 5] = 0
    return x, rng.normal(size=(IN, OUT)) / IN**0.5


def grid(w, bits, symmetric):
    """`(scale, zero, least, most)` of one group `[n, OUT]`."""
    if symmetric:
        return np.abs(w).max(0) / (2 ** (bits - 1) - 1), np.full(w.shape[1], 2.0 ** (bits - 1)), 1, 2**bits - 1
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    scale = (high - low) / (2**bits - 1)
    return scale, np.round(-low / scale), 0, 2**bits - 1


def optimal_brain(x, w, bits, block, symmetric, damping, order):
    """The paper's equations 2 and 3, input by input: an explicit inverse Hessian, from which each input is removed."""
    w, n = w.copy(), len(w)
    hessian = x.T @ x
    dead = np.diag(hessian) == 0
    hessian += np.eye(n) * np.where(dead, 1, damping * np.diag(hessian).mean())
    inverse, left, quantized = np.linalg.inv(hessian), list(range(n)), np.zeros_like(w)
    block = block or n
    early = {g: grid(w[g : g + block], bits, symmetric) for g in range(0, n, block)}
    grids = {}
    for i in order:
        g = i // block * block
        if g not in grids:
            grids[g] = grid(w[g : g + block], bits, symmetric) if list(order) == sorted(order) else early[g]
        scale, zero, least, most = grids[g]
        quantized[i] = (np.clip(np.round(w[i] / scale) + zero, least, most) - zero) * scale
        at = left.index(i)
        error = (w[i] - quantized[i]) / inverse[at, at]
        w[left] -= np.outer(inverse[:, at], error)
        inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        inverse = np.delete(np.delete(inverse, at, 0), at, 1)
        left.remove(i)
    return quantized


@pytest.mark.parametrize(
    ("bits", "block", "symmetric", "act_order"),
    [(4, 8, True, False), (4, 8, False, False), (4, 8, True, True), (2, 0, False, True)],
)
def test_gptq_is_the_papers_loop(bits, block, symmetric, act_order, problem):
    x, w = problem
    gram = x.T @ x
    options = {"bits": bits, "block": block, "symmetric": symmetric}
    form = gptq.quantize_gptq(np.float32(w), gram, None, **options, act_order=act_order, damping=0.05)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(IN)
    expected = optimal_brain(x, w, bits, block, symmetric, 0.05, order)
    assert_close(values(form), expected)
    like = jax.eval_shape(integer(**options), np.float32(w))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), form) == jax.tree.map(lambda a: (a.shape, a.dtype), like)


def test_gptq_takes_kernels_that_no_block_divides(problem):
    x, w = problem
    form = gptq.quantize_gptq(
        np.float32(w[:22]), (x.T @ x)[:22, :22], None, bits=4, block=8, symmetric=True, act_order=False, damping=0.05
    )
    assert_close(values(form), optimal_brain(x[:, :22], w[:22], 4, 8, True, 0.05, range(22)))


def rounded(w, block, symmetric):
    """Round to nearest in groups, float64."""
    out = np.zeros_like(w)
    for g in range(0, len(w), block):
        scale, zero, least, most = grid(w[g : g + block], 4, symmetric)
        out[g : g + block] = (np.clip(np.round(w[g : g + block] / scale) + zero, least, most) - zero) * scale
    return out


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_is_the_papers_search(symmetric, problem):
    x, w = problem
    mean = np.abs(x).mean(0)
    size = np.maximum(mean / mean.max(), 1e-4)
    found = {}
    for a in np.linspace(0, 1, 11):
        s = size**a / np.sqrt((size**a).max() * (size**a).min())
        kernel = rounded(w * s[:, None], 8, symmetric) / s[:, None]
        found[np.linalg.norm(x @ (w - kernel))] = kernel
    options = {"bits": 4, "block": 8, "symmetric": symmetric}
    form = awq.quantize_awq(np.float32(w), x.T @ x, mean, **options, grid=11)
    assert_close(values(form), found[min(found)])
    once = awq.quantize_awq(np.float32(w), x.T @ x, mean, **options, grid=1)  # the exponent 0
    assert_close(values(once), rounded(w, 8, symmetric))


def test_both_err_less_than_rounding_on_correlated_inputs(problem):
    x, w = problem
    options = {"bits": 4, "block": 8, "symmetric": False}
    made = {
        "rounded": jax.jit(SCHEMES["int4"](8, symmetric=False))(np.float32(w)),
        "gptq": gptq.quantize_gptq(np.float32(w), x.T @ x, None, **options, act_order=False, damping=0.01),
        "awq": awq.quantize_awq(np.float32(w), x.T @ x, np.abs(x).mean(0), **options, grid=20),
    }
    error = {name: np.linalg.norm(x @ (w - np.float64(values(form)))) for name, form in made.items()}
    assert error["gptq"] < 0.6 * error["rounded"]
    assert error["awq"] < 0.9 * error["rounded"]


SEGMENTS = np.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], np.int32)
KINDS = {
    "llama": {"top_layers": 1},
    "gemma": {},  # local and global layers in turn
    "encoder": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_one_by_one_are_the_model(kind):
    model, params = models.encoder() if kind == "encoder" else models.decoder(kind, **KINDS[kind])
    c, tokens = model.config, models.tokens(2)
    layers = LayerRunner(c, params, ["layers/mlp/down/kernel"], [(tokens, SEGMENTS), (tokens[:1], SEGMENTS[:1])])
    for stack, i in layers.order:
        layers.advance(stack, i, {})
    h, first = map(np.asarray, layers._streams)
    assert_close(first, h[:1])
    if kind != "encoder":
        h = jax.jit(Norm(c.norm, c.norm_eps, c.norm_offset).apply)({"params": params["norm"]}, h)
    expected = np.asarray(models.run(model, params, tokens, segments=SEGMENTS))
    assert_close(np.asarray(h)[SEGMENTS > 0], expected[SEGMENTS > 0])


def test_inputs_are_those_of_real_tokens_behind_quantized_layers():
    model, params = models.decoder("llama")
    tokens, names = models.tokens(2), [f"layers/attn/{n}/kernel" for n in "qo"]
    layers = LayerRunner(model.config, params, names, [(tokens, SEGMENTS), (tokens[1:], SEGMENTS[1:])])
    h = np.float64(params["embed"]["embedding"])[np.concatenate([tokens[SEGMENTS > 0], tokens[1][SEGMENTS[1] > 0]])]
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + model.config.norm_eps)
    x *= np.float64(params["layers"]["attn_norm"]["scale"][0])
    found = layers.kernel_inputs("layers", 0)
    assert sorted(found) == sorted(names)
    gram, mean = found["layers/attn/q/kernel"]
    assert_close(gram, x.T @ x)
    assert_close(mean, np.abs(x).mean(0))
    layers.advance("layers", 0, {"layers/attn/o/kernel": jnp.zeros((24, 16))})
    zeroed = tree.map_named(lambda n, w: w.at[0].set(0) if n == "layers/attn/o/kernel" else w, params)
    other = LayerRunner(model.config, zeroed, names, [(tokens, SEGMENTS), (tokens[1:], SEGMENTS[1:])])
    other.advance("layers", 0, {})
    for a, b in zip(layers.kernel_inputs("layers", 1).values(), other.kernel_inputs("layers", 1).values(), strict=True):
        assert_close(a, b)


def text_of(files, **options):
    return data.DataConfig(source=f"jsonl:{files / 'records.jsonl'}", **{"seq_len": 16, "batch_size": 4, **options})


@pytest.mark.parametrize(
    ("model", "group"),
    [
        ("llama", {"name": "gptq", "block": 8, "act_order": True, "target": "layers/mlp/(gate|up)/kernel"}),
        ("bert", {"name": "awq", "block": 8, "grid": 3, "target": "layers/mlp/down/kernel"}),
    ],
)
def test_a_calibrated_base_is_written_and_read(model, group, files, tmp_path):
    out = quantization.write_quantized(str(files / model), group, tmp_path / "out", text=text_of(files), rows=6)
    base, plain = pretrained.load(str(out)), pretrained.load(str(files / model))
    assert base.quantized == {**group, "param_dtype": "float32"}
    forms = {n: w for n, w in tree.named_leaves(base.params, is_weight) if is_weight(w)}
    kernels = dict(tree.named_leaves(plain.params))
    assert len(forms) == (2 if model == "llama" else 1)
    for name, w in forms.items():
        assert isinstance(w, InputScaled) == (group["name"] == "awq")
        assert 0 < np.linalg.norm(values(w) - np.asarray(kernels[name])) < 0.3 * np.linalg.norm(kernels[name])
    with pytest.raises(UserError, match="in codes already"):
        quantization.write_quantized(str(out), group, tmp_path / "again", text=text_of(files))


def test_what_cannot_be_calibrated_is_named(files, tmp_path):
    model, out = str(files / "llama"), tmp_path / "out"
    with pytest.raises(UserError, match="gptq needs data to calibrate by"):
        quantization.write_quantized(model, "gptq", out)
    with pytest.raises(UserError, match=r"gptq needs data: .*launch\.quantize --scheme=gptq"):
        pretrained.describe(model, quantized="gptq")
    with pytest.raises(UserError, match=r"'gptk' \(did you mean 'gptq'\?\)"):
        quantization.write_quantized(model, "gptk", out)
    for options, message in (({"damping": 0.0}, "damping must be above 0"), ({"actorder": True}, "'scheme.act_order'")):
        with pytest.raises(UserError, match=message):
            quantization.write_quantized(model, {"name": "gptq", **options}, out)
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n")
    text = data.DataConfig(source=f"jsonl:{tmp_path / 'short.jsonl'}", seq_len=16)
    with pytest.raises(UserError, match="has only 2 calibration tokens, less than one row of 16"):
        quantization.write_quantized(model, "gptq", out, text=text)
    with pytest.raises(UserError, match="rows=0 is below 1"):
        quantization.write_quantized(model, "gptq", out, text=text, rows=0)
    base, rows = pretrained.load(model), [(models.tokens(1) % 20, np.ones((1, models.T), np.int32))]
    with pytest.raises(UserError, match="head/kernel is not the kernel of a Linear in a layer"):
        quantization.quantize_calibrated(base, {"name": "awq", "target": ".*kernel"}, rows)
    broken = tree.map_named(lambda n, w: w.at[1, 2, 3].set(jnp.nan) if n == "layers/mlp/up/kernel" else w, base.params)
    with pytest.raises(UserError, match="'layers/mlp/up/kernel' holds NaN"):
        quantization.quantize_calibrated(dataclasses.replace(base, params=broken), {"name": "awq"}, rows)
    moe, params = models.decoder("moe")
    with pytest.raises(UserError, match="layers/mlp/experts/up/kernel is not the kernel of a Linear"):
        LayerRunner(moe.config, params, ["layers/mlp/experts/up/kernel"], rows)
