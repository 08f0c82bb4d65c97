"""The value of a method's regularizer in the log: of the parameters alone, and of the tokens that pass a router."""

import jax
import pytest

from lowrank.training import build, loop
from lowrank.training.log import METRICS, read_metrics
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

Q = "layers/attn/q/kernel"


def first_line(config, folder):
    loop.run(config, folder)
    return read_metrics(folder / METRICS)[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_holds_the_orthogonality_of_an_adalora(files, tmp_path, accumulate):
    arg = f"method=adalora,init_rank=4,target_rank=2,orthogonal=0.5,tinit=1,tfinal=1,target={Q}"
    config = config_of(files, arg, steps=3, mesh__data=1, optim__accumulate=accumulate, checkpoint__every=0)
    run = build.build_run(config)
    params, _ = run.attach(run.load().params)
    w = params["layers"]["attn"]["q"]["kernel"]
    assert_close(first_line(config, tmp_path)["train/regularizer"], 0.5 * jax.jit(lambda w: w.orthogonality())(w))


@pytest.mark.parametrize("group", [{"name": "more", "per_token": 2}, {"name": "smore", "experts": [4], "fanout": [2]}])
def test_the_log_holds_the_balance_of_experts_which_the_loss_leaves_out(files, tmp_path, group):
    lines = []
    for balance in (0.0, 0.5):
        config = config_of(files, steps=2, mesh__data=1, checkpoint__every=0)
        config.method = {**group, "balance": balance, "target": Q}
        lines.append(first_line(config, tmp_path / str(balance)))
    without, balanced = lines
    assert balanced["train/loss"] == without["train/loss"]
    assert "train/regularizer" not in without
    # E sum_e f_e P_e of each of the two layers is 1 where all experts are used alike, and at most E / 2.
    assert 0.5 * 2 * 0.9 < balanced["train/regularizer"] < 0.5 * 2 * 2
