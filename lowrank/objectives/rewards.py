"""Rewards of texts: Python functions, found by name or by the path that imports them, and what they return, checked.

A reward function is called as TRL's are, with the keywords `prompts`, `completions`, `completion_ids` and one for each
further field of the records, each a list with one item per text; it returns one number per text. It receives those
keywords that it names, or all of them if it takes `**kwargs`.
"""

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank.core.errors import UserError, nearest, plural
from lowrank.metrics.text import normalize

RewardFunction = Callable[..., Sequence[float]]
OWN = ("prompt", "completion", "completion_ids")  # fields of a record that the function is given as texts


class Sample(NamedTuple):
    """A text that the model wrote, and what it was asked."""

    record: Mapping[str, Any]
    where: str  # the record's place, for a reader
    prompt: str
    text: str
    ids: Sequence[int]  # the text's tokens, with the one that ended it
    ended: bool  # whether it ended by itself, or had as many tokens as it may have


def think_format(completions: Sequence[str]) -> list[float]:
    """1 for a text that starts with `<think>`, closes it, and opens no second one before; else 0."""
    form = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
    return [float(bool(form.match(text))) for text in completions]


def exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1 for a text that is the record's `answer`, up to case, punctuation, articles and spaces; else 0."""
    return [float(normalize(text) == normalize(str(a))) for text, a in zip(completions, answer, strict=True)]


def grounded(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The share of a text's words that are in its prompt; 0 for a text without words."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        known, words = set(_words(prompt)), _words(text)
        found.append(sum(word in known for word in words) / max(1, len(words)))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


REWARDS: dict[str, RewardFunction] = {"exact_match": exact_match, "grounded": grounded, "think_format": think_format}


class Rewards:
    """Reward functions and their weights. `names` are those that the log shows."""

    def __init__(self, functions: str | Sequence[str], weights: Sequence[float] = ()) -> None:
        """`functions` are names of `REWARDS` or paths `package.module.function`; weights are 1 by default.

        Raises UserError for a function that cannot be found, for two of one name, and for weights that do not fit.
        """
        paths = (functions,) if isinstance(functions, str) else tuple(functions)
        if not paths:
            raise UserError("objective.reward_funcs is empty: name a function that gives texts their rewards")
        self.functions = [find_function(path) for path in paths]
        self.names = [path.rpartition(".")[2] for path in paths]
        if doubled := [name for name, count in Counter(self.names).items() if count > 1]:
            raise UserError(f"objective.reward_funcs names two functions {doubled[0]!r}: rename one of them")
        if weights and len(weights) != len(paths):
            given, asked = plural(len(weights), "weight"), plural(len(paths), "function")
            raise UserError(f"objective.reward_weights has {given} for {asked}: give one for each")
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"objective.reward_weights must be finite numbers, not {tuple(weights)}")
        self.weights = np.array(weights or [1.0] * len(paths))

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """`[B, F]`: the rewards of the samples by each function.

        Raises UserError, naming the function and the record, where a function raises, returns another number of
        rewards, or one that is not a finite number.
        """
        columns = zip(self.names, self.functions, strict=True)
        return np.stack([_rewards(name, function, samples) for name, function in columns], axis=-1)


def find_function(path: str) -> RewardFunction:
    """The function of `REWARDS` with this name, or the one at `package.module.function`. Raises UserError."""
    module, _, name = path.rpartition(".")
    if not module:
        if path not in REWARDS:
            known = f"known: {', '.join(REWARDS)}, or a path package.module.function"
            raise UserError(f"unknown reward function {path!r}{nearest(path, REWARDS)}; {known}")
        return REWARDS[path]
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as e:
        raise UserError(f"objective.reward_funcs: {module} cannot be imported: {_line(e)}") from e
    if not callable(found):
        close = nearest(name, (n for n in vars(importlib.import_module(module)) if not n.startswith("_")))
        raise UserError(f"objective.reward_funcs: {module} has no function {name!r}{close}")
    return found


def _rewards(name: str, function: RewardFunction, samples: Sequence[Sample]) -> np.ndarray:
    try:
        found = _call(function, samples)
    except Exception as e:
        raise UserError(f"{_culprit(function, samples).where}: the reward function {name!r} raises {_line(e)}") from e
    if not hasattr(found, "__len__") or len(found) != len(samples):
        gave = plural(len(found), "reward") if hasattr(found, "__len__") else f"{type(found).__name__}"
        asked = f"{plural(len(samples), 'text')}, the first of which is of {samples[0].where}"
        raise UserError(f"the reward function {name!r} returns {gave} for {asked}: it must return one for each")
    for value, sample in zip(found, samples, strict=True):
        if not _is_number(value):
            text = f"{sample.text[:60]!r}"
            raise UserError(f"{sample.where}: the reward function {name!r} gives {value!r} for the text {text}")
    return np.array([float(value) for value in found])


def _call(function: RewardFunction, samples: Sequence[Sample]) -> Any:
    fields = dict.fromkeys(field for sample in samples for field in sample.record if field not in OWN)
    keywords: dict[str, list[Any]] = {field: [sample.record.get(field) for sample in samples] for field in fields}
    keywords |= {"prompts": [s.prompt for s in samples], "completions": [s.text for s in samples]}
    keywords["completion_ids"] = [list(s.ids) for s in samples]
    parameters = inspect.signature(function).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        keywords = {name: keywords[name] for name in parameters if name in keywords}
    return function(**keywords)


def _culprit(function: RewardFunction, samples: Sequence[Sample]) -> Sample:
    """The first sample for which the function raises when it is alone, or the first of all."""
    for sample in samples:
        try:
            _call(function, [sample])
        except Exception:
            return sample
    return samples[0]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _line(e: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return " ".join(f"{type(e).__name__}: {e}".split("\n")[0].split())
