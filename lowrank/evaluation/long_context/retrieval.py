"""What a model finds in a long text, by the text's length and by the depth at which it stands.

A prompt is drawn from its seed, task, length, depth and number alone, so that models are compared on the same ones. An
answer is found where a greedy continuation of the prompt starts with it, and then with no further letter or digit.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import Tokenizer
from lowrank.data.encode import encode_pieces
from lowrank.evaluation.long_context.reader import Reader

DIGITS = 5  # of a pass key, and of the keys and values of a list
NUMBERS = range(10 ** (DIGITS - 1), 10**DIGITS)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
LIST = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
PAIR = '{comma}"{key}": "{value}"'
LIST_QUESTION = '}}\n\nKey: "{key}"\nCorresponding value: "'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and those of its answer."""

    ids: Sequence[int]
    answer: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a task's prompt is made for: tokens with the answer, a depth in [0, 1], and the text around a pass key."""

    tokenizer: Tokenizer
    length: int
    depth: float
    filler: Sequence[int]

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a piece of the prompt, with `start` of its first one."""
        return encode_pieces(self.tokenizer, [(text, False)], start)[0]

    def asking(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The ids of the question and of the answer after it."""
        ids, learned = encode_pieces(self.tokenizer, [(question, False), (answer, True)], start=False)
        split = learned.index(True)
        return ids[:split], ids[split:]

    def check(self, task: str, least: int) -> None:
        """Raises UserError for a length in which the task's shortest prompt does not fit."""
        if self.length < least:
            raise UserError(f"a {task} prompt needs {plural(least, 'token')}, and a length is {self.length}: raise it")


def passkey(draw: random.Random, asked: Asked) -> Prompt:
    """A number of `DIGITS` digits in irrelevant text (Mohtashami & Jaggi 2023, arXiv:2305.16300)."""
    key = draw.choice(NUMBERS)
    head, needle = asked.encode(INTRODUCTION, start=True), asked.encode(NEEDLE.format(key=key))
    question, answer = asked.asking(QUESTION, f" {key}")
    around = asked.length - sum(map(len, (head, needle, question, answer)))
    asked.check("passkey", asked.length - around)
    begin = draw.randrange(len(asked.filler))
    text = [int(asked.filler[(begin + i) % len(asked.filler)]) for i in range(around)]
    before = round(asked.depth * around)
    return Prompt([*head, *text[:before], *needle, *text[before:], *question], answer)


def key_value(draw: random.Random, asked: Asked) -> Prompt:
    """The value of one key in a JSON object of as many pairs as fit (Liu et al. 2024, arXiv:2307.03172).

    Keys and values are numbers of `DIGITS` digits, all different, where the paper has UUIDs.
    """
    head = asked.encode(LIST, start=True)
    numbers = draw.sample(NUMBERS, min(2 * asked.length, len(NUMBERS)))
    pairs, listed, left = list(zip(numbers[::2], numbers[1::2], strict=True)), list[list[int]](), asked.length
    for key, value in pairs:
        listed.append(asked.encode(PAIR.format(comma=",\n " if listed else "", key=key, value=value)))
        left -= len(listed[-1])
        if left < len(head):
            break
    while True:
        key, value = pairs[round(asked.depth * (len(listed) - 1))]
        question, answer = asked.asking(LIST_QUESTION.format(key=key), str(value))
        ids = [*head, *itertools.chain(*listed), *question]
        if len(ids) + len(answer) <= asked.length:
            return Prompt(ids, answer)
        if len(listed) == 1:
            asked.check("kv", len(ids) + len(answer))
        listed.pop()


TASKS: Mapping[str, Callable[[random.Random, Asked], Prompt]] = {"passkey": passkey, "kv": key_value}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of prompts of one task, length and depth: how many there are, and the share whose answer was found."""

    task: str
    length: int
    depth: float
    prompts: int
    found: float


def prompts(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    *,
    samples: int,
    seed: int = 0,
    filler: Sequence[int] = (),
) -> list[Prompt]:
    """`samples` prompts of at most `length` tokens with their answers.

    `filler` are the ids of the text around a pass key, of which each prompt takes another part; by default the five
    sentences of the paper, again and again. Raises UserError for an unknown task, a depth that is not in [0, 1], and a
    length in which the task does not fit.
    """
    if task not in TASKS:
        raise unknown("retrieval task", task, TASKS)
    if not 0 <= depth <= 1:
        raise UserError(f"a depth of {depth} is not in [0, 1], the start and the end of a text")
    filler = filler if len(filler) else encode_pieces(tokenizer, [(GRASS, False)], start=False)[0]
    asked = Asked(tokenizer, length, depth, filler)
    keys = [f"{seed}/{task}/{length}/{depth:g}/{i}" for i in range(samples)]
    return [TASKS[task](random.Random(key), asked) for key in keys]


def retrieve(
    reader: Reader,
    tokenizer: Tokenizer,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int,
    seed: int = 0,
    filler: Sequence[int] = (),
) -> Iterator[Cell]:
    """The cells of a task, length by length. The keywords, and the errors, are those of `prompts`."""
    how = {"samples": samples, "seed": seed, "filler": filler}
    cells = {(n, depth): prompts(task, tokenizer, n, depth, **how) for n in lengths for depth in depths}
    for (length, depth), asked in cells.items():
        answers = found(reader, tokenizer, asked, length)
        yield Cell(task, length, depth, len(answers), float(np.mean(answers)))


def found(reader: Reader, tokenizer: Tokenizer, asked: Sequence[Prompt], length: int) -> list[bool]:
    """Whether a greedy continuation of each prompt is its answer, and ends there."""
    size = max(len(prompt.answer) for prompt in asked)
    rows = [np.array([*prompt.ids, *prompt.answer], np.int32) for prompt in asked]
    written = [ids[size - len(p.answer) :] for p, ids in zip(asked, reader.greedy(rows, size, length), strict=True)]
    return [_is_answer(tokenizer, p.answer, ids) for p, ids in zip(asked, written, strict=True)]


def _is_answer(tokenizer: Tokenizer, answer: Sequence[int], written: np.ndarray) -> bool:
    after = tokenizer.decode([int(written[len(answer)])])
    return written[: len(answer)].tolist() == list(answer) and not after[:1].isalnum()
