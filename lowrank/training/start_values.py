"""Start values of a fine-tuning run for a model and data of a given size, each with the source that it comes from.

They are where a search begins, not where it ends. A source is a paper's table, or a study of this project.
"""

import dataclasses
import math
from typing import Any

BILLION = 10**9
FEW = 1000  # examples, below which full tuning is argued against
LEAST_STEPS = 100  # below which a schedule with a warm-up is hardly a schedule
BITS_PER_TOKEN, BITS_PER_PARAMETER = 1, 2  # what a token teaches at most, and what a trained parameter can hold
RANKS = (8, 16, 32, 64, 128, 256)
WITHOUT_REGRET = "LoRA Without Regret, Thinking Machines, 2025"
QLORA = "QLoRA, arXiv:2305.14314"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the start values depend on."""

    parameters: int  # of the model
    per_rank: int  # trained parameters of LoRA on all linear maps, for each unit of rank
    examples: int
    rows: int  # of an epoch: as many as the examples, or fewer where rows are packed
    prompt_tokens: float  # the mean of an example; 0 for documents
    completion_tokens: float  # the mean of an example, or the length of a document


@dataclasses.dataclass(frozen=True)
class StartValue:
    """A key of a config, its value, and why."""

    key: str
    value: Any
    why: str


def start_values(facts: Facts) -> list[StartValue]:
    """The values of the method, the optimizer and the data for `facts`, in the order in which they are chosen."""
    r = rank(facts)
    return [
        _method(facts),
        StartValue("method.rank", r, _why_rank(facts)),
        StartValue(
            "method.alpha", 2.0 * r, "twice the rank, as DoRA's authors (arXiv:2402.09353); keep it when r varies"
        ),
        StartValue("optim.lr", *_learning_rate(facts)),
        StartValue("data.batch_size", batch_size(facts), _why_batch(facts)),
        StartValue("steps", steps(facts), _why_steps(facts)),
        StartValue("optim.warmup", max(1, round(0.03 * steps(facts))), f"3 % of the steps ({QLORA})"),
        StartValue("data.prompt_loss_weight", *_prompt_loss_weight(facts)),
    ]


def _method(facts: Facts) -> StartValue:
    """LoRA on all linear maps; for few examples, with the figures that argue against full tuning."""
    why = f"on all linear maps, which beats attention alone at equal parameters ({WITHOUT_REGRET}; {QLORA})"
    if facts.examples < FEW:
        why += (
            f"; {facts.examples} examples argue against full tuning: on 100 of MNLI it scores 60.2 and LoRA 63.8 "
            "(arXiv:2106.09685, Table 16)"
        )
    return StartValue("method.name", "lora", why)


def rank(facts: Facts) -> int:
    """The least rank whose parameters can hold what the examples can teach: at least 8, and 16 from 1e9 parameters."""
    taught = facts.examples * facts.completion_tokens * BITS_PER_TOKEN
    least = RANKS[0] if facts.parameters < BILLION else RANKS[1]
    able = [r for r in RANKS if r >= least and r * facts.per_rank * BITS_PER_PARAMETER >= taught]
    return able[0] if able else RANKS[-1]


def _why_rank(facts: Facts) -> str:
    tokens = round(facts.examples * facts.completion_tokens)
    return (
        f"{rank(facts) * facts.per_rank:,} parameters for {tokens:,} tokens to learn, at 2 bits each and 1 bit a token "
        f"({WITHOUT_REGRET}); ranks 1 to 64 scored alike on GPT-3 (arXiv:2106.09685, Table 6)"
    )


def _learning_rate(facts: Facts) -> tuple[float, str]:
    ten = "about ten times that of full tuning, whatever the rank"
    if facts.parameters < BILLION:
        own = (
            "in experiments/lora_rank 40 steps of a small model liked 1e-2, and in experiments/bitfit full tuning 3e-4"
        )
        return 1e-3, f"{ten} ({WITHOUT_REGRET}); {own}"
    if facts.parameters < 20 * BILLION:
        return 2e-4, f"{ten} ({WITHOUT_REGRET}); {QLORA}: 7B and 13B"
    return 1e-4, f"{ten} ({WITHOUT_REGRET}); {QLORA}: 33B and 65B"


def batch_size(facts: Facts) -> int:
    """16 rows, or fewer where an epoch of 16 rows is less than ten steps."""
    return next((b for b in (16, 8, 4) if facts.rows >= 10 * b), 4)


def _why_batch(facts: Facts) -> str:
    few = "under 16, as an epoch would have fewer than ten steps; " if batch_size(facts) < 16 else ""
    most = f"LoRA tolerates large batches less than full tuning, so stay under 32 ({WITHOUT_REGRET})"
    return f"{few}{most}; 16 in {QLORA}, 7B and 13B"


def epochs(facts: Facts) -> int:
    """Three passes, one from 50,000 examples on, and up to ten where three are fewer than 100 steps."""
    if facts.examples >= 50_000:
        return 1
    return min(10, max(3, math.ceil(LEAST_STEPS * batch_size(facts) / max(1, facts.rows))))


def steps(facts: Facts) -> int:
    """The steps of `epochs` passes over the rows."""
    return max(1, epochs(facts) * facts.rows // batch_size(facts))


def _why_steps(facts: Facts) -> str:
    passes = "1 pass" if epochs(facts) == 1 else f"{epochs(facts)} passes"
    usual = "three are usual (DoRA's authors, arXiv:2402.09353), more below 100 steps, one from 50,000 examples on"
    return f"{passes} over {facts.rows:,} rows: {usual}; `checkpoint.best` keeps the best step"


def _prompt_loss_weight(facts: Facts) -> tuple[float, str]:
    if not facts.prompt_tokens:
        return 0.0, "documents have no prompt"
    ratio = facts.completion_tokens / facts.prompt_tokens
    lengths = f"answers are {ratio:.2g} times as long as prompts"
    if ratio < 1:
        return 0.1, f"{lengths}: 0.01 to 0.1 did best on short answers (arXiv:2401.13586)"
    return 0.0, f"{lengths}: the weight made no difference on long answers (arXiv:2401.13586)"
