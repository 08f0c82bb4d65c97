"""A search finds every mesh that shards a run, and orders those that fit by the bound on their time."""

import math

import jax
import pytest

from launch import preflight
from lowrank.core.errors import UserError
from lowrank.memory import devices, search, traffic
from lowrank.memory.advice import abstract_mesh
from lowrank.memory.shapes import step_inputs
from lowrank.training import build
from tests.support.close import assert_close
from tests.support.tiny_checkpoint import KV_HEADS, LAYERS, WIDTH
from tests.support.tiny_runs import config_of

ROWS, LENGTH = 8, 32
TARGET = devices.parse_topology("v5e:2x4")

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own


def config(files, **changes):
    return config_of(files, "rank=2", data__batch_size=ROWS, data__seq_len=LENGTH, **changes)


def candidates(files, memory=TARGET.memory, **changes):
    return search.candidates(config(files, **changes), TARGET._replace(memory=memory), jax.devices())


def test_every_mesh_uses_all_devices_and_shards_rows_heads_and_slices_evenly(files):
    run = build.build_run(config(files, mesh__data=1))
    found = list(search.meshes(run, 8))
    assert {"data": 1, "fsdp": 8, "context": 1, "tensor": 1} in found
    assert {"data": 2, "fsdp": 1, "context": 2, "tensor": 2} in found
    for sizes in found:
        assert math.prod(sizes.values()) == 8
        assert KV_HEADS % sizes["tensor"] == 0
        assert ROWS % (sizes["data"] * sizes["fsdp"]) == 0
    assert len(found) == len({tuple(sizes.items()) for sizes in found})
    assert {sizes["data"] % 4 for sizes in search.meshes(run, 8, slices=4)} == {0}


def test_what_fits_is_ordered_by_its_bound(files):
    found = candidates(files)
    assert found == sorted(found, key=lambda c: c.order)
    assert {c.changes["model.remat"] for c in found} == set(search.REMAT)
    assert found[0].changes["model.remat"] == "none"  # nothing is computed again where all fits
    assert {ROWS // (c.changes["mesh.data"] * c.changes.get("mesh.fsdp", 1)) for c in found} == {1, 2, 4, 8}


def test_less_memory_leaves_fewer_and_slower_ones(files):
    every = candidates(files)
    room = min(c.memory.peak for c in every)
    found = candidates(files, memory=room)
    assert 0 < len(found) < len(every)
    assert found[0].bound.step >= every[0].bound.step
    assert candidates(files, memory=room - 1) == []


def test_the_chosen_one_fits_as_compiled(files):
    first, second, *_ = found = candidates(files)
    assert search.chosen(found, TARGET) == first
    too_large = [search.dataclasses.replace(first, compiled=TARGET.memory + 1), second]
    assert search.chosen(too_large, TARGET) is None
    small = search.dataclasses.replace(second, compiled=TARGET.memory)
    assert search.chosen([too_large[0], small], TARGET) == small
    assert second.flags in search.to_text([too_large[0], small], TARGET).splitlines()[-1]
    assert search.to_json([first, small], TARGET)["chosen"] == dict(second.changes)
    assert "no mesh" in search.to_text([], TARGET)


def test_the_command_prints_flags_that_build_the_run(files, capsys):
    words = ["--config=configs/tiny.py", f"--config.model.name={files / 'llama'}", "--worker", "--formula", "--search"]
    words += [f"--config.data.source=jsonl:{files / 'records.jsonl'}", "--topology=v5e:2x4"]
    assert preflight.main(words) == 0
    flags = capsys.readouterr().out.splitlines()[-1].split()
    run = build.build_run(preflight.load_config("configs/tiny.py", [*words[1:2], words[5], *flags]))
    assert run.mesh.size == 8


def test_other_devices_than_tpus_are_refused(files):
    with pytest.raises(UserError, match="--search orders runs by the figures of TPU chips: give --topology"):
        search.candidates(config(files), devices.parse_device("h100:8"), jax.devices())


@pytest.mark.parametrize(
    ("mesh", "moved"),
    [
        ({}, lambda layers, head, adapter: 0),
        ({"fsdp": 4}, lambda layers, head, adapter: 2 * (layers + adapter) + head + adapter / 4),
        ({"tensor": 2}, lambda layers, head, adapter: LAYERS * 2 * 3 * ROWS * LENGTH * WIDTH * 4),  # no gradient's sum
    ],
)
def test_a_step_moves_gathered_shards_and_sums_of_activations(mesh, moved, files):
    run = build.build_run(config(files, mesh__data=1, model__remat="full"))
    run = search.dataclasses.replace(run, mesh=abstract_mesh(**mesh))
    inputs = step_inputs(run)
    whole = lambda part: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))  # noqa: E731
    head = whole(inputs.frozen["head"] if "head" in inputs.frozen else inputs.frozen["embed"])
    expected = moved(whole(inputs.frozen["layers"]), head, whole(inputs.state.trained))
    assert_close(traffic.moved_bytes(run, inputs), expected, relative=0.02)
