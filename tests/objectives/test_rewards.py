"""Reward functions: what they receive, and the errors that name one and its record."""

import sys
import types

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.objectives.rewards import REWARDS, Rewards, Sample, exact_match, grounded, think_format

TEXTS = ["one", "two", "three"]


def samples():
    return [
        Sample({"answer": text, "prompt": "old"}, f"a.jsonl:{i}", "ask", text, [i], True)
        for i, text in enumerate(TEXTS, 1)
    ]


def rewards(monkeypatch, function, weights=()):
    """The rewards of a function that is found by its path."""
    module = types.ModuleType("rewards_of_a_test")
    module.mine = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Rewards(f"{module.__name__}.mine", weights)


def test_a_function_receives_what_it_names_and_all_of_it_with_keywords(monkeypatch):
    seen = {}
    rewards(monkeypatch, lambda answer, completions: [1.0] * len(seen.setdefault("answer", answer)))(samples())
    assert seen["answer"] == TEXTS

    def of_trl(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, ids=completion_ids)
        return [True, 2, np.float32(0.5)]

    found = rewards(monkeypatch, of_trl)(samples())
    assert found.tolist() == [[1.0], [2.0], [0.5]]
    assert seen == {"answer": TEXTS, "prompts": ["ask"] * 3, "completions": TEXTS, "ids": [[1], [2], [3]]}


def test_rewards_of_several_functions_have_their_names():
    found = Rewards(["grounded", "exact_match"], [0.5, 1.0])
    assert found.names == ["grounded", "exact_match"]
    assert found(samples()).tolist() == [[0.0, 1.0]] * 3


def test_the_rewards_of_the_table():
    assert set(REWARDS) == {"exact_match", "grounded", "think_format"}
    assert exact_match(["The cat!", "a dog"], answer=["cat", 3]) == [1, 0]
    assert grounded(["A cat sat.", "x", "x"], ["the Cat, sat", "", "x"]) == [2 / 3, 0, 1]
    assert think_format(["<think>\na\n</think>b", "a<think></think>", "<think>a<think></think>", "<think>"]) == [
        1,
        0,
        0,
        0,
    ]


def _raises(completions):
    if "two" in completions:
        raise KeyError("two\nlines")
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_raises, r"^a.jsonl:2: the reward function 'mine' raises KeyError: 'two\\nlines'$"),
        (
            lambda completions: [0.0, float("nan"), 0.0],
            "^a.jsonl:2: the reward function 'mine' gives nan for the text 'two'$",
        ),
        (
            lambda completions: [0.0, 1.0, None],
            "^a.jsonl:3: the reward function 'mine' gives None for the text 'three'$",
        ),
        (lambda completions: ["1", 1.0, 1.0], "^a.jsonl:1: the reward function 'mine' gives '1'"),
        (lambda completions: [1.0], "'mine' returns 1 reward for 3 texts, the first of which is of a.jsonl:1"),
        (lambda completions: 1.0, "'mine' returns float for 3 texts"),
        (lambda completions, gold: [1.0] * 3, "^a.jsonl:1: the reward function 'mine' raises TypeError: .*'gold'"),
    ],
)
def test_a_function_that_fails_is_named_with_the_record(function, text, monkeypatch):
    with pytest.raises(UserError, match=text):
        rewards(monkeypatch, function)(samples())
