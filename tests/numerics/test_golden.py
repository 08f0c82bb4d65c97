"""The losses of the golden run, compiled as users compile them, against those of `golden.json`.

A change that alters the losses of a case for a good reason writes its line of the file again:

    python -m tests.support.golden --only "llama/lora$" --losses tests/numerics/golden.json
"""

import json
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.close import assert_close

EXPECTED = json.loads((Path(__file__).parent / "golden.json").read_text())
# A processor without fused multiply-add differs from one with AVX-512 by 2.4e-6, of which 1.7e-6 is the sum of weights.
RELATIVE = 1e-5
# A value that crosses to the next activation of 8 bits or the next bfloat16 differs by a whole step.
ROUNDED = {"llama/qat": 2e-2, "bert/qat": 2e-2, "llama/lora-bfloat16": 1e-3}


def test_every_case_has_its_losses():
    assert sorted(EXPECTED) == sorted(golden.CASES)


@pytest.mark.parametrize("name", golden.CASES)
def test_ten_steps_lose_as_recorded(name, files):
    losses = golden.record(name, files)["losses"]
    assert_close(losses, EXPECTED[name], relative=ROUNDED.get(name, RELATIVE), name=name)
