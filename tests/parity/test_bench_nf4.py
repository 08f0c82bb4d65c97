"""The comparison with bitsandbytes runs, on a tiny kernel."""

import numpy as np
import pytest

from experiments.bench import nf4
from tests.support.close import assert_close


@pytest.mark.parametrize("double", [False, True])
def test_both_sides_agree_and_are_timed(double):
    kernel = np.random.default_rng(0).standard_normal((128, 48)).astype(np.float32)
    found = nf4.compare(kernel, double, rounds=3, rows=4, pause=0)
    assert 0.05 < found["error"]["ours"] < 0.15
    for operation in nf4.OPERATIONS:
        times = found[operation]
        assert_close(times["ratio"], times["bitsandbytes"] / times["ours"])
        assert times["ours"] > 0


def test_sides_that_differ_are_refused(monkeypatch):
    ours = nf4.ours
    monkeypatch.setattr(nf4, "ours", lambda kernel, x, double: ours(kernel * 1.01, x, double))
    with pytest.raises(ValueError, match="do not agree"):
        nf4.compare(np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32), False, 3, 4, 0)
