"""What a TPU's compiler makes of our products, ahead of time and without a TPU."""

import os
import subprocess
import sys

import pytest

from lowrank.plan import devices


def test_a_large_product_and_its_gradient_make_no_copy_of_the_kernel():
    """A 4096 x 14336 kernel is 235 MB in float32; a program's temporaries stay below 32 MB in all, on a v5e."""
    pytest.importorskip("libtpu", reason="there is one for Linux on x86-64 alone")
    environment = os.environ | devices.tpu_environment(devices.topology("v5e:4x4"))
    command = [sys.executable, "-m", "tests.large_product"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split())) < 32e6
