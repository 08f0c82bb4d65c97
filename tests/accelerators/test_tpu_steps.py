"""Training steps at real shapes: what the committed results of the TPU's compiler show, and what their traces hold."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import tpu, tpu_cases
from launch import preflight
from lowrank.core import tree
from lowrank.core.weight import is_weight
from lowrank.memory import residuals, shapes, tpus
from lowrank.training import build, step
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
METHODS = ("lora", "dora", "qlora", "qlora int4", "prompt", "full")
ROWS, LENGTH = 2, 256
COMPILED = """
import json
from experiments.bench import tpu, tpu_cases
print(json.dumps(tpu.measure(tpu_cases.cases()[0], compiles=True)))
"""


def traced_run(method):
    """A run on the shapes of Llama-3.1-8B, on one device."""
    case = tpu_cases.Case("llama-3.1-8b", method, "v5e:4x4", ROWS, LENGTH, {})
    options, changes = preflight.parse(case.words)
    changes = [*changes, "--config.mesh.fsdp=1"]
    return build.build_run(preflight.load_config(options.config, changes), jax.devices()[:1], planned=True)


def compiled_numbers(module, *words):
    """The numbers that a module of `tests.support` prints of what it compiles for four chips."""
    command = [sys.executable, "-m", f"tests.support.{module}", *words]
    environment = os.environ | tpus.environment("v5e:2x2") | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def kernel_products(files, arg, **changes):
    """The products in a small compiled step whose result has the shape of a kernel, in either orientation."""
    run = build.build_run(config_of(files, arg, mesh__data=1, **changes))
    inputs = shapes.step_inputs(run)
    text = step.compile_step(run.step(run.optimizer()), inputs.state, inputs.frozen, inputs.batch).as_text()
    kernels = {tuple(w.shape[-2:]) for name, w in tree.named_leaves(run.shapes, is_weight) if name.endswith("kernel")}
    found = [tuple(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)]
    assert found
    return [shape for shape in found if shape in kernels or shape[::-1] in kernels]


def test_frozen_kernels_get_no_gradient(files):
    assert not kernel_products(files, "rank=2")
    assert not kernel_products(files, "rank=2", model__quantize={"name": "nf4", "block": 8})
    assert kernel_products(files, "method=full")  # where there is one, it is seen


@pytest.mark.parametrize("method", METHODS)
def test_no_block_saves_an_activation_in_float32(method):
    run = traced_run(method)
    saved = residuals._residuals(run, shapes.step_inputs(run), ROWS)
    tokens = LENGTH + run.network.config.num_virtual_tokens
    layers = [x for x in saved if x.shape[:3] == (run.network.config.layers, ROWS, tokens)]
    assert [x.dtype for x in layers] == [jnp.bfloat16]  # the input of each block
    wide = [
        x
        for x in saved
        if x.dtype == jnp.float32 and x.shape[:1] == (ROWS,) and math.prod(x.shape[1:]) >= LENGTH * 1024
    ]
    assert not wide  # that of the last norm neither, nor the gradient that the chunked loss keeps


def test_the_compiled_steps_gather_the_base_layer_by_layer():
    """Beside residuals, gradients and head, temporaries are below an eighth of a base that is gathered whole."""
    compiled = {key: r for key, r in tpu.read().items() if "compiled" in r and "llama-3.1-8b" in key}
    assert compiled
    head, base = 2 * 4096 * 128256, 2 * 8.03e9
    for key, r in compiled.items():
        assert "refused" not in r["compiled"], key
        kept = r["formula"]["activations"] + r["formula"]["adapter"]
        assert r["compiled"]["temporary"] < kept + 2 * head + base / 8, key


def test_the_formula_is_near_the_compiled_steps():
    for key, r in tpu.read().items():
        if "total" in r.get("compiled", {}):
            assert 0.85 < r["formula"]["peak"] / r["compiled"]["total"] < 1.15, key


def test_a_step_of_eight_billion_parameters_still_compiles_to_its_results():
    case = tpu_cases.cases()[0]
    want = tpu.read()[case.key]
    command = [sys.executable, "-c", COMPILED]
    environment = os.environ | tpus.environment(case.topology) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert (case.method, found["words"], found["formula"]) == ("lora", want["words"], want["formula"])
    moved, moved_before = (sum(size for _, size in r["collectives"].values()) for r in (found, want))
    assert_close(moved, moved_before, relative=0.05)
    assert_close(found["compiled"]["total"], want["compiled"]["total"], relative=0.05)


def test_codes_move_between_chips_where_kernels_in_bfloat16_would():
    """Codes in four bits and their scales have 9/32 of the bytes, in the forward and the backward pass."""
    (kernels,), (codes,) = (compiled_numbers("gathered_bytes", scheme) for scheme in ("bfloat16", "nf4"))
    assert 0 < codes < 0.3 * kernels


def test_a_frozen_head_moves_once_for_all_chunks_of_the_logits():
    moved, head = compiled_numbers("gathered_head")
    assert 0 < moved < 1.5 * head


def test_a_case_whose_command_changed_is_not_read_from_the_results():
    known = {case.key: case.words for case in tpu_cases.cases()}
    results = json.loads(tpu.OUT.read_text())
    assert {key: r["words"] for key, r in results.items()} == {key: known[key] for key in results}
