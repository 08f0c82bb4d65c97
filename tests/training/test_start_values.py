"""Start values follow the sizes of the model and of the data."""

import dataclasses

import pytest

from lowrank.training.start_values import Facts, start_values

SMALL = Facts(135 * 10**6, 305_280, examples=2000, rows=2000, prompt_tokens=400, completion_tokens=10)
LARGE = Facts(8 * 10**9, 2_621_440, examples=60_000, rows=60_000, prompt_tokens=50, completion_tokens=200)


def values(facts, **changes):
    return {v.key: v.value for v in start_values(dataclasses.replace(facts, **changes))}


def test_a_larger_model_takes_a_higher_rank_and_a_lower_rate():
    small, large = values(SMALL), values(LARGE)
    assert (small["method.rank"], large["method.rank"]) == (8, 16)
    assert (small["optim.lr"], large["optim.lr"]) == (1e-3, 2e-4)
    assert values(LARGE, parameters=70 * 10**9)["optim.lr"] == 1e-4
    assert small["method.alpha"] == 2 * small["method.rank"]


def test_the_rank_can_hold_what_the_data_teach():
    taught = 100_000 * 500  # bits: one a token
    rank = values(SMALL, examples=100_000, completion_tokens=500.0)["method.rank"]
    assert 2 * SMALL.per_rank * rank >= taught > 2 * SMALL.per_rank * rank / 2
    assert values(SMALL, examples=10**7, completion_tokens=500.0)["method.rank"] == 256


@pytest.mark.parametrize(
    ("rows", "batch", "passes"), [(2000, 16, 3), (240, 16, 7), (100, 8, 8), (40, 4, 10), (9, 4, 10), (60_000, 16, 1)]
)
def test_few_rows_are_seen_more_often_in_smaller_batches(rows, batch, passes):
    found = values(SMALL, examples=rows, rows=rows)
    assert found["data.batch_size"] == batch
    assert found["steps"] == max(1, passes * rows // batch)
    assert 1 <= found["optim.warmup"] <= max(1, found["steps"] // 20)


def test_answers_that_are_shorter_than_prompts_ask_for_a_prompt_loss_weight():
    assert values(SMALL)["data.prompt_loss_weight"] == 0.1
    assert values(LARGE)["data.prompt_loss_weight"] == 0.0
    assert values(SMALL, prompt_tokens=0)["data.prompt_loss_weight"] == 0.0


def test_a_few_hundred_examples_argue_against_full_tuning():
    says = lambda n: "argue against full tuning" in start_values(dataclasses.replace(SMALL, examples=n))[0].why  # noqa: E731
    assert says(300)
    assert not says(1000)


def test_every_value_has_a_source():
    for facts in (SMALL, LARGE, dataclasses.replace(SMALL, examples=100, rows=3)):
        for value in start_values(facts):
            assert any(word in value.why for word in ("arXiv:", "Regret", "study")), value
