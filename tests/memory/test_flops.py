"""The operations of a step are those of its products, counted here one by one."""

import dataclasses

import pytest

from lowrank.memory import devices, flops, formulas, roofline, shapes
from lowrank.training import build
from tests.support.close import assert_close
from tests.support.tiny_checkpoint import HEADS, HIDDEN, KV_HEADS, LAYERS, WIDTH, vocabulary
from tests.support.tiny_runs import config_of

HEAD = WIDTH // HEADS
KERNELS = {"q": (WIDTH, WIDTH), "k": (WIDTH, KV_HEADS * HEAD), "v": (WIDTH, KV_HEADS * HEAD), "o": (WIDTH, WIDTH)}
KERNELS |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
ROWS, LENGTH, RANK = 8, 32, 2


def counted(trained, adapted, remat):
    """`(model, recomputed)`: two operations an entry for `y`, for `dx`, and for `dW` where `dW` is asked for."""
    tokens = ROWS * LENGTH
    block = sum(2 * a * b for a, b in KERNELS.values()) + sum(2 * RANK * sum(KERNELS[n]) for n in adapted)
    own = sum(2 * RANK * sum(KERNELS[n]) for n in adapted) if adapted else block
    scores = 2 * 2 * (LENGTH / 2) * HEADS * HEAD  # scores and values, of half of the row
    forward, head = LAYERS * (block + scores), 2 * WIDTH * len(vocabulary())
    gradients = LAYERS * own + (head if trained == "all" else 0)
    return tokens * (3 * forward - LAYERS * block + 2 * head + gradients), tokens * forward * (remat == "full")


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(("arg", "quantize"), [("rank=2", None), ("rank=2", {"name": "nf4", "block": 8})])
def test_an_adapter_takes_four_operations_an_entry_of_its_base(files, arg, quantize, remat):
    run = build.build_run(config_of(files, arg, mesh__data=1, model__quantize=quantize, model__remat=remat))
    found = flops.step_flops(run, shapes.step_inputs(run))
    assert dataclasses.astuple(found) == counted("adapter", "qv", remat)


def test_full_tuning_takes_six(files):
    run = build.build_run(config_of(files, "method=full", mesh__data=1, model__remat="none"))
    found = flops.step_flops(run, shapes.step_inputs(run))
    assert dataclasses.astuple(found) == counted("all", "", "none")


def test_the_bound_is_the_slowest_resource(files):
    run = build.build_run(config_of(files, mesh__data=1))
    target, inputs = devices.parse_topology("v5e:1x1"), shapes.step_inputs(run)
    work, memory = flops.step_flops(run, inputs), formulas.estimate_memory(run, inputs)
    bound = roofline.bound(target, run, work, memory, moved=3 * 10**15)
    assert bound.compute == work.executed / 197e12
    assert bound.step == bound.links == 3e15 / 200e9
    assert_close(bound.mfu * bound.step * 197e12, work.model)
    assert roofline.bound(devices.parse_device("h100"), run, work, memory, 0) is None
