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
RELATIVE = 1e-5


def test_every_case_has_its_losses():
    assert sorted(EXPECTED) == sorted(golden.CASES)


@pytest.mark.parametrize("name", golden.CASES)
def test_ten_steps_lose_as_recorded(name, files):
    assert_close(golden.record(name, files)["losses"], EXPECTED[name], relative=RELATIVE, name=name)
