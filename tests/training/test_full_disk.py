"""A checkpoint that a disk has no room for is one line of error, and the one before it survives."""

import gc
import resource
import subprocess
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.training.checkpoint import Checkpointer

BIG = 1_500_000  # random bytes; more than `small_disk` holds


def noise(size=BIG):
    return {"w": jnp.asarray(np.random.default_rng(0).integers(-128, 128, size, dtype=np.int8))}


@pytest.fixture
def litter():
    """Collects what failed writes leave before the next test, which has no filter of `Checkpointer` for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()


@pytest.fixture
def small_disk(tmp_path, litter):
    """A folder whose disk takes less than a megabyte: a tmpfs where we may mount one, else a limit on file size."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode == 0:
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            yield place
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(small_disk, capfd):
    small = {"w": jnp.arange(8, dtype=jnp.int8)}
    saver = Checkpointer(small_disk / "c", keep=1)
    saver.save(1, small, {"step": 1}, block=True)
    saver.save(2, noise(), {"step": 2})
    with pytest.raises(UserError, match=r"(no space left on device|file too large); step 1 is intact$") as caught:
        saver.wait()
    assert "\n" not in str(caught.value)
    assert saver.latest() == 1
    saver.save(3, small, {"step": 3}, block=True)  # the half-written step is gone, so there is room again
    saver.close()
    with Checkpointer(small_disk / "c", keep=1) as again:
        restored, meta = again.restore(
            again.latest(), {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in small.items()}
        )
    assert meta["step"] == 3
    np.testing.assert_array_equal(restored["w"], small["w"])
    assert "Traceback" not in capfd.readouterr().err


def test_a_failed_write_surfaces_at_the_next_save_and_at_the_end(small_disk):
    saver = Checkpointer(small_disk / "c", keep=1)
    saver.save(1, {"w": jnp.ones(2)}, {}, block=True)
    saver.save(2, noise(), {})
    with pytest.raises(UserError, match="step 1 is intact"):
        saver.save(3, {"w": jnp.ones(2)}, {})
    saver.save(4, noise(), {})
    with pytest.raises(UserError, match="step 1 is intact"):
        saver.close()
    saver.close()
    assert saver.steps() == [1]


def test_the_threads_of_a_failed_write_say_nothing(small_disk, capfd):
    leaves = {f"{i}/a": jnp.asarray(noise(40_000)["w"]) for i in range(40)} | noise()
    for attempt in range(3):
        saver = Checkpointer(small_disk / str(attempt))
        saver.save(1, leaves, {})
        with pytest.raises(UserError, match="the run has no earlier checkpoint"):
            saver.close()
    assert capfd.readouterr().err == ""


def test_another_error_is_not_hidden_by_a_failed_write(small_disk):
    def train():
        with Checkpointer(small_disk / "c") as saver:
            saver.save(2, noise(), {})
            raise KeyError("culprit")

    with pytest.raises(KeyError, match="culprit") as caught:
        train()
    assert "could not be written" in caught.value.__notes__[0]


def test_a_background_failure_can_be_seen_without_waiting(small_disk):
    saver = Checkpointer(small_disk / "c")
    saver.check()
    saver.save(1, noise(), {})

    def poll():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            saver.check()

    with pytest.raises(UserError, match="the run has no earlier checkpoint"):
        poll()
    saver.close()
