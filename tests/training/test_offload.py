"""A state on the host: bits as on the device, kept by checkpoints, counted by plans, said where it cannot be."""

import jax
import numpy as np
import pytest

from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.memory import advice, formulas
from lowrank.memory import shapes as abstract
from lowrank.training import build, offload
from lowrank.training.checkpoint import Checkpointer
from tests.support.tiny_runs import config_of
from tests.support.tiny_steps import LR, build_step

LACK = "cpu does not address pinned_host memory"


def same(a, b):
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def kinds(state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((1, 1, 1), {"b_ratio": 4.0}), ((1, 4, 2), {"full": True, "weight_decay": 0.1, "accumulate": 2})],
)
def test_a_paged_optimizer_makes_the_same_bits_and_gives_its_old_state_up(sizes, options):
    plain, there, frozen, batch, _ = build_step(sizes=sizes, **options)
    paged, here, *_ = build_step(sizes=sizes, paged=True, **options)
    assert kinds(here.optimizer) == {"pinned_host"}
    for _ in range(3):
        before = here
        there, want = plain(there, frozen, batch, LR)
        here, got = paged(here, frozen, batch, LR)
    assert (kinds(here.optimizer), kinds(here.trained)) == ({"pinned_host"}, {"device"})
    assert all(x.is_deleted() for x in jax.tree.leaves(before.optimizer))
    assert same((there, want), (here, got))


def test_a_checkpoint_holds_a_paged_state_and_gives_it_back_where_it_lay(tmp_path):
    program, state, frozen, batch, _ = build_step(
        sizes=(1, 4, 2), paged=True, full=True, weight_decay=0.1, accumulate=2
    )
    state, _ = program(state, frozen, batch, LR)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, flatten_named(state), {})
        want, _ = program(state, frozen, batch, LR)  # donates what is being saved
        saver.wait()
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flatten_named(want).items()
        }
        found = unflatten_named(want, saver.restore(1, like)[0])
    assert kinds(found.optimizer) == {"pinned_host"}
    assert same(program(found, frozen, batch, LR)[0], want)


def test_the_plan_counts_moments_on_the_host_and_a_leaf_on_its_way(files):
    plain, paged = (build.build_run(config_of(files, "rank=2", mesh__data=1, optim__paged=p)) for p in (False, True))
    there, here = formulas.estimate_memory(plain), formulas.estimate_memory(paged)
    shapes = abstract.step_inputs(paged).state
    assert (here.moments, here.host) == (there.moments - here.host, there.moments - here.moments)
    assert here.moments < 16 < here.host  # numbers stay
    largest = max(x.size for x in jax.tree.leaves(shapes.trained))
    assert here.temporary - there.temporary == 2 * 4 * largest  # Adam's two
    assert "optim.paged" in {key for option in advice.possible_options(plain, 0) for key in option.changes}
    assert "optim.paged" not in {key for option in advice.possible_options(paged, 0) for key in option.changes}


def test_a_device_without_host_memory_is_said_and_keeps_the_state(files, monkeypatch):
    monkeypatch.setattr(offload, "memory_kinds", lambda device: ["device"])
    run = build.build_run(config_of(files, "rank=2", mesh__data=1, optim__paged=True))
    assert kinds(abstract.step_inputs(run).state.optimizer) <= {"device", None}
    note = f"warning: optim.paged: {LACK}, so the optimizer's state stays in the device's memory"
    assert run.notes == (note,)
    assert run.table.endswith(note)  # which the log and the report show


def test_activations_that_cannot_be_offloaded_stay_and_that_is_said(files, monkeypatch):
    config = config_of(files, "rank=2", mesh__data=1, model__remat="offload")
    there = formulas.estimate_memory(build.build_run(config))
    monkeypatch.setattr(offload, "memory_kinds", lambda device: ["device"])
    run = build.build_run(config)
    assert run.network.config.remat_names == ("input",)
    note = f"warning: model.remat=offload: {LACK}, so the saved activations stay in the device's memory"
    assert run.notes == (note,)
    here = formulas.estimate_memory(run)
    assert (here.host, here.activations) == (0, there.activations + there.host)
    assert there.host > 0
