"""A checkpoint is whole or absent, comes back as it was, and fits only what it was made for."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank.core.errors import UserError
from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.training import checkpoint
from lowrank.training.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]


def abstract(arrays, sharding=None):
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for n, a in arrays.items()}


def arrays_of_every_kind():
    return {
        "layers/attn/q/kernel/a": jnp.arange(24.0).reshape(2, 3, 4),
        "layers/attn/q/kernel/b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 3,
        "int8.codes": jnp.arange(-4, 4, dtype=jnp.int8),
        "int4/codes": jnp.arange(-8, 8).astype(jnp.int4),
        "seed": jnp.array([1, 2**32 - 1], jnp.uint32),
        "opt/0/count": jnp.int32(7),
        "half": jnp.ones((1,), jnp.float16),
        "float8": jnp.ones((3,), jnp.float8_e4m3fn),
        "flag": jnp.array(True),
    }


def test_arrays_of_every_dtype_and_rank_come_back_bit_for_bit(tmp_path):
    arrays = arrays_of_every_kind()
    meta = {"step": 3, "config": {"optim": {"lr": 1e-4}, "patterns": [".*", None]}}
    with Checkpointer(tmp_path / "c") as first:
        first.save(3, arrays, meta, host={"epoch": 1})
    with Checkpointer(tmp_path / "c") as second:
        restored, found = second.restore(second.latest(), abstract(arrays))
    assert found == {**meta, "host": {"epoch": 1}}
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert restored[name].dtype == array.dtype
        assert restored[name].shape == array.shape
        assert np.asarray(restored[name]).tobytes() == np.asarray(array).tobytes(), name


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, arrays_of_every_kind(), {"step": 1})
    files = [p for p in (tmp_path / "c").rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files if p.suffix in {".pkl", ".pickle"} or p.read_bytes()[:2] in {b"\x80\x04", b"\x80\x05"}]


def test_optimizer_state_round_trips_by_name(tmp_path):
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.zeros((4,), jnp.bfloat16), "frozen": None}}
    labels = {"a": "fast", "b": {"c": "slow", "frozen": None}}
    optimizer = optax.multi_transform({"fast": optax.adamw(0.1), "slow": optax.sgd(0.1, momentum=0.9)}, labels)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    flat = flatten_named({"params": params, "opt": state})
    assert "params/b/c" in flat
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, flat, {}, block=True)
        restored, _ = saver.restore(1, abstract(flat))
    again = unflatten_named({"params": params, "opt": state}, restored)
    assert jax.tree.structure(again) == jax.tree.structure({"params": params, "opt": state})
    jax.tree.map(np.testing.assert_array_equal, again["opt"], state)


def test_names_must_be_unique_and_the_same():
    with pytest.raises(UserError, match="two leaves have the name 'a/b'"):
        flatten_named({"a": {"b": 1}, "a/b": 2})
    with pytest.raises(UserError, match=r"leaf 'kernel' is missing from the tree .did you mean 'kernal'"):
        unflatten_named({"kernel": 1}, {"kernal": 1})


def test_arrays_return_on_another_mesh(tmp_path):
    devices = np.array(jax.devices())
    spec = jax.sharding.PartitionSpec("x", "y")
    wide = jax.sharding.NamedSharding(jax.sharding.Mesh(devices.reshape(4, 2), ("x", "y")), spec)
    tall = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:2].reshape(1, 2), ("x", "y")), spec)
    arrays = {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), wide)}
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, arrays, {}, block=True)
        restored, _ = saver.restore(1, abstract(arrays, tall))
    assert restored["w"].sharding.is_equivalent_to(tall, 2)
    np.testing.assert_array_equal(restored["w"], arrays["w"])


def test_restore_names_what_does_not_fit(tmp_path):
    arrays = {"q/a": jnp.ones((2, 3)), "q/b": jnp.ones(())}
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, arrays, {}, block=True)
        fits = abstract(arrays)
        with pytest.raises(UserError, match=r"leaf 'q/c' is missing from checkpoint .*/1$"):
            saver.restore(1, {**fits, "q/c": fits["q/a"]})
        with pytest.raises(UserError, match=r"leaf 'k/a' is missing .*did you mean 'q/a'"):
            saver.restore(1, {"k/a": fits["q/a"], "q/b": fits["q/b"]})
        with pytest.raises(UserError, match=r"leaf 'q/b' of checkpoint .* is not one of this run"):
            saver.restore(1, {"q/a": fits["q/a"]})
        with pytest.raises(UserError, match=r"leaf 'q/a' is float32\[2,3\] in .* but float32\[2,4\] in this run"):
            saver.restore(1, {**fits, "q/a": jax.ShapeDtypeStruct((2, 4), jnp.float32)})
        with pytest.raises(UserError, match=r"leaf 'q/a' is float32\[2,3\] in .* but bfloat16\[2,3\] in this run"):
            saver.restore(1, {**fits, "q/a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})
        with pytest.raises(UserError, match=r"lacks a checkpoint of step 2; choose one of its steps: 1"):
            saver.restore(2, fits)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    arrays = {"w": jnp.ones((64, 64))}
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, arrays, {}, block=True)
        for file in (tmp_path / "c" / "1" / "arrays").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(UserError, match=r"checkpoint .*/1 cannot be read") as caught:
            saver.restore(1, abstract(arrays))
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match=r"checkpoint folder .*/c cannot be used"):
        Checkpointer(tmp_path / "c")


@pytest.mark.parametrize("leaf", [jnp.ones((3,), jnp.uint4), jnp.ones((0, 2)), jax.random.key(0)])
def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path, leaf):
    with Checkpointer(tmp_path / "c") as saver:
        with pytest.raises(UserError, match="leaf 'odd' is"):
            saver.save(1, {"odd": leaf}, {})
        assert saver.latest() is None


def test_the_newest_are_kept_and_periods_are_due(tmp_path):
    with Checkpointer(tmp_path / "c", every=5, keep=2) as saver:
        assert [step for step in range(12) if saver.due(step)] == [5, 10]
        for step in (5, 10, 11):
            saver.save(step, {"w": jnp.full((2,), step)}, {"step": step})
        saver.save(11, {"w": jnp.zeros((2,))}, {"step": 0}, block=True)  # already there: left alone
        assert saver.steps() == [10, 11]
        assert saver.meta(11)["step"] == 11
    with Checkpointer(tmp_path / "d") as saver:
        assert not saver.due(5)
    with pytest.raises(UserError, match=r"checkpoint\.keep=0"):
        Checkpointer(tmp_path / "e", keep=0)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    w = jnp.zeros((1000, 100))
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(1, {"w": w}, {})
        w = jax.jit(lambda x: x + 1, donate_argnums=0)(w)
        saver.wait()
        restored, _ = saver.restore(1, abstract({"w": w}))
    assert not np.any(restored["w"])


KILLED = """
import sys, threading, jax.numpy as jnp
from lowrank.training.checkpoint import Checkpointer
saver = Checkpointer(sys.argv[1], keep=1)
saver.save(1, {"w": jnp.arange(4)}, {"step": 1}, block=True)
def never(event, args):  # a save ends with the renaming of its folder
    if event == "os.rename" and str(args[1]).endswith("/2"):
        print("half", flush=True)
        threading.Event().wait()
sys.addaudithook(never)
saver.save(2, {"w": jnp.arange(4) + 1}, {"step": 2})
saver.wait()
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "c"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half\n"
        child.kill()
    halves = [p.name for p in (tmp_path / "c").iterdir() if "tmp" in p.name]
    assert halves
    with Checkpointer(tmp_path / "c") as saver:
        assert saver.steps() == [1]
        restored, meta = saver.restore(1, {"w": jax.ShapeDtypeStruct((4,), jnp.int32)})
        assert meta["step"] == 1
        np.testing.assert_array_equal(restored["w"], np.arange(4))
        assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1"]


def test_what_a_kill_left_is_gone_when_the_folder_is_open(tmp_path):
    half = tmp_path / "c" / "5.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    for i in range(3000):
        (half / str(i)).touch()
    with Checkpointer(tmp_path / "c") as saver:
        assert not half.exists()
        saver.save(5, {"w": jnp.arange(4)}, {"step": 5}, block=True)
        assert saver.steps() == [5]


PROCESS = """
import os, signal, sys, time, jax, numpy as np
address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.preemption import StopSignal
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
whole = np.arange(8, dtype=np.float32)
array = jax.make_array_from_callback((8,), sharding, lambda i: whole[i])
with Checkpointer(folder) as saver, StopSignal() as stop:
    saver.save(1, {"w": array}, {"step": 1}, host={"reader": "x" * index, "index": index})
    saver.wait()
    arrays, meta = saver.restore(1, {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)})
    for shard in arrays["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert not stop.requested(1)
    if index == 1:
        os.kill(os.getpid(), signal.SIGINT)
    step = 2
    while not stop.requested(step):
        step += 1
        time.sleep(0.01)
    print(meta["step"], meta["host"]["index"], saver.latest(), step)
"""


def test_two_processes_write_one_checkpoint_and_each_gets_its_own_state_back(tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = [sys.executable, "-c", PROCESS, address]
    how = {"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE}
    children = [subprocess.Popen([*run, str(i), tmp_path / "c"], **how) for i in range(2)]
    said = [child.communicate(timeout=120)[0].splitlines()[-1].split() for child in children]
    assert [words[:3] for words in said] == [["1", "0", "1"], ["1", "1", "1"]]
    assert said[0][3] == said[1][3]  # one of them got SIGINT, both stop after the same step
    with Checkpointer(tmp_path / "c") as saver, pytest.raises(UserError, match="data states of 2 processes"):
        saver.meta(1)


def test_the_reason_is_one_short_line():
    assert checkpoint._reason(ValueError("first\nsecond")) == "ValueError: first"
    assert checkpoint._reason(OSError(28, "No space left on device")) == "no space left on device"
    assert len(checkpoint._reason(ValueError("x" * 5000))) < 300
