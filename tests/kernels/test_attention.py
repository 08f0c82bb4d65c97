"""The forms of attention beside attention written one query at a time in float64, forward and gradients."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lowrank.core.errors import UserError
from lowrank.kernels.attention import blockwise, cudnn, dense, dispatch, splash
from lowrank.kernels.attention.mask import Mask
from tests.support import thinning
from tests.support.attention_cases import CASES, HEAD, Case, mask_of, reference, seen
from tests.support.close import assert_close
from tests.support.tiny_models import normal

FORMS = {"dense": dense.attend, "blockwise": partial(blockwise.attend, block=8)}
INTERPRETED = {"splash": partial(splash.attend, interpret=True)}
SCALE = 0.7


def arrays(case):
    """`q`, `k`, `v` and a gradient of the output."""
    see = seen(case)
    (_, T, S), (N, K) = see.shape, case.heads
    return [2 * normal(i, 2, length, heads, HEAD) for i, (length, heads) in enumerate([(T, N), (S, K), (S, K), (T, N)])]


def output_and_gradients(attend, q, k, v, g):
    """The output, and the gradients of `sum(g * output)` by q, k and v."""

    @jax.jit
    def both(q, k, v, g):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(g)

    return both(q, k, v, g)


COMBINED = [f"{form}: {case}" for form in FORMS for case in CASES]
LEFT = [name for name in COMBINED if name.startswith("dense") and "cap" not in name]


@pytest.mark.parametrize("name", thinning.leave(COMBINED, LEFT))
def test_a_form_equals_float64(name):
    form, _, case = name.partition(": ")
    case = CASES[case]
    q, k, v, g = arrays(case)
    attend = lambda q, k, v: (FORMS | INTERPRETED)[form](q, k, v, mask_of(case), scale=SCALE, softcap=case.cap)  # noqa: E731
    expected = reference(q, k, v, g, seen(case), SCALE, case.cap)
    size = [np.max(np.abs(x)) for x in (expected[0], g, g, g)]
    for ours, exact, scale in zip(output_and_gradients(attend, q, k, v, g), expected, size, strict=True):
        assert_close(ours, exact, relative=2e-5, size=scale)


@pytest.mark.parametrize("name", CASES)
def test_a_mask_shows_the_keys_that_the_rules_allow(name):
    see = seen(CASES[name])
    ours = mask_of(CASES[name]).expand(*see.shape[1:])
    assert np.array_equal(np.broadcast_to(ours, see.shape), see)


def test_blocks_that_no_query_sees_are_not_visited():
    options = blockwise.Options(1.0, 0.0, 8, 8)
    cases = (Case(21), [0, 0, 0], [1, 2, 3]), (Case(21, window=5), [0, 0, 1], [1, 2, 3])
    packed = Case(((1,) * 8 + (2,) * 8 + (3,) * 8, (1,) * 8 + (2,) * 16))
    for case, first, end in (*cases, (packed, [0, 1, 1], [1, 2, 3])):
        visits = blockwise.visits(mask_of(case), case.length, case.length, options)
        assert [x.tolist() for x in visits[1:]] == [first, end]


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.bfloat16, 0.02), (jnp.float16, 6e-3)])
@pytest.mark.parametrize("form", FORMS)
def test_the_softmax_is_float32_in_half_precision(form, dtype, relative):
    case = CASES["packed"]
    q, k, v, g = (jnp.asarray(x, dtype) for x in arrays(case))
    ours = output_and_gradients(lambda q, k, v: FORMS[form](q, k, v, mask_of(case)), q, k, v, g)
    for x, exact in zip(ours, reference(q, k, v, g, seen(case), HEAD**-0.5, 0.0), strict=True):
        assert x.dtype == dtype
        assert_close(np.asarray(x, np.float64), exact, relative=relative)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_in_one_row_reaches_no_other_row(form):
    case = CASES["packed"]
    q, k, v, g = arrays(case)
    attend = partial(FORMS[form], mask=mask_of(case))
    exact = output_and_gradients(attend, q, k, v, g)
    found = output_and_gradients(attend, jnp.asarray(q).at[0, 3].set(jnp.nan), k, v, g)
    for x, expected in zip(found, exact, strict=True):
        assert_close(x[1:], expected[1:])
        assert np.isnan(x[0]).any()


def test_no_array_of_scores_exists_at_length():
    T = 4096
    shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(dispatch.attend(q, k, v, Mask(causal=True)))

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * T * T


def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient():
    see = Case(((1, 1, 1),), heads=(1, 1))
    q, k, v, g = arrays(see)
    mask = mask_of(Case(((1, 1, 1),)))
    mask = Mask(mask.queries, mask.keys._replace(segments=jnp.full((1, 3), 2, jnp.int32)))
    for x in output_and_gradients(lambda q, k, v: blockwise.attend(q, k, v, mask), q, k, v, g):
        assert not np.any(x)


def shapes(length, width=64, dtype=jnp.bfloat16, keys=0):
    """Queries and keys as shapes."""
    return [jax.ShapeDtypeStruct((1, n, 4, width), dtype) for n in (length, keys or length)]


@pytest.mark.parametrize(
    ("platform", "inputs", "mask", "form"),
    [
        ("cpu", shapes(512), Mask(), "dense"),
        ("cpu", shapes(520), Mask(), "blockwise"),
        ("rocm", shapes(2048), Mask(), "blockwise"),
        ("tpu", shapes(1, keys=2**15), Mask(), "dense"),
        ("tpu", shapes(256), Mask(causal=True), "dense"),
        ("tpu", shapes(512), mask_of(CASES["local of a mixed stack"]), "splash"),
        ("tpu", shapes(2048), mask_of(CASES["prefix, packed, window"]), "blockwise"),
        ("tpu", shapes(2048), mask_of(CASES["virtual tokens, window"]), "blockwise"),
        ("tpu", shapes(2048), mask_of(CASES["both directions, virtual tokens, prefix"]), "blockwise"),
    ],
)
def test_auto_takes_the_form_for_length_mask_and_platform(platform, inputs, mask, form):
    assert dispatch.choose(platform, *inputs, mask) == form


def test_a_named_form_that_cannot_run_is_refused():
    q, k = shapes(600)
    with pytest.raises(UserError, match=r"unknown form of attention 'flash'.*known: auto, blockwise, cudnn, dense"):
        dispatch.choose("cpu", q, k, Mask(), 0.0, "flash")
    with pytest.raises(UserError, match=r"splash cannot run: .* neither virtual tokens nor a prefix; use .*blockwise"):
        dispatch.choose("tpu", q, k, mask_of(CASES["virtual tokens, window"]), 0.0, "splash")
    run = jax.jit(lambda q, k: dispatch.attend(q, k, k, Mask(causal=True), implementation="splash"))
    with pytest.raises(UserError, match="splash cannot run: it is only for tpu, not for cpu"):
        run.lower(q, k)
    assert "tpu_custom_call" in run.trace(q, k).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", ["causal", "every token", "packed", "local of a mixed stack"])
def test_splash_equals_float64(name):
    """Run by Pallas's interpreter."""
    test_a_form_equals_float64(f"splash: {name}")


H100, A100, V100 = (
    SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {name}", compute_capability=capability)
    for name, capability in (("H100", "9.0"), ("A100", "8.0"), ("V100", "7.0"))
)


def test_cudnn_is_not_asked_for_a_part_of_a_row(monkeypatch):
    monkeypatch.setattr(cudnn, "nvidia_devices", lambda: [H100])
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("context",))):
        assert dispatch.choose("cuda", *shapes(128), Mask(causal=True)) == "dense"


@pytest.mark.parametrize(
    ("devices", "inputs", "options", "refusal"),
    [
        ([H100], shapes(128, 256), {}, ""),
        ([A100], shapes(128, 128, jnp.float16, keys=256), {}, ""),
        ([A100], shapes(128, 256), {}, "heads of up to 128 before Hopper, not 256"),
        ([V100, H100], shapes(128), {}, "Ampere generation or later"),
        ([], shapes(128), {}, "Ampere generation or later"),
        ([H100], shapes(128, dtype=jnp.float32), {}, "in half precision, not in float32"),
        ([H100], shapes(128, 60), {}, "a multiple of 8"),
        ([H100], shapes(1, keys=128), {}, "even lengths"),
        ([H100], shapes(128), {"softcap": 2.0}, "no soft cap"),
        ([H100], shapes(8192), {"mask": mask_of(CASES["packed"])}, "no segments"),
        ([H100], shapes(512), {"mask": mask_of(CASES["packed"])}, ""),
    ],
)
def test_cudnn_is_asked_only_for_what_it_takes(monkeypatch, devices, inputs, options, refusal):
    monkeypatch.setattr(cudnn, "nvidia_devices", lambda: devices)
    arguments = *inputs, options.get("mask", Mask(causal=True)), options.get("softcap", 0.0)
    if refusal:
        assert dispatch.choose("cuda", *arguments) in ("dense", "blockwise")
        with pytest.raises(UserError, match=f"attention=cudnn cannot run: .*{refusal}.*use attention=blockwise"):
            dispatch.choose("cuda", *arguments, "cudnn")
    else:
        assert dispatch.choose("cuda", *arguments) == dispatch.choose("cuda", *arguments, "cudnn") == "cudnn"
        assert dispatch.choose("cpu", *arguments) == "dense"


@pytest.mark.parametrize("name", ["causal", "window", "every token", "left padding, cap"])
def test_cudnn_is_given_the_mask_of_the_dense_form(monkeypatch, name):
    """The very arguments, computed by XLA; only cuDNN's own arithmetic needs a GPU."""
    given, attend = [], jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        given.append((implementation, options["is_causal"], options["local_window_size"]))
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    case = CASES[name]
    q, k, v, g = arrays(case)
    ours = output_and_gradients(lambda q, k, v: cudnn.attend(q, k, v, mask_of(case), scale=SCALE), q, k, v, g)
    expected = reference(q, k, v, g, seen(case), SCALE, 0.0)
    for x, exact, size in zip(ours, expected, (expected[0], g, g, g), strict=True):
        assert_close(x, exact, relative=2e-5, size=np.max(np.abs(size)))
    static = mask_of(case).is_static
    window = (case.window - 1, 0) if static and case.window else None
    assert given == [("cudnn", static and not case.bidirectional, window)]
