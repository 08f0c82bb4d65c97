"""The cases of the benchmark of a step, and which of them slowed."""

from typing import Any, NamedTuple

SLOWER = 0.1  # the fall of a ratio that a check reports, as a share of it


class Case(NamedTuple):
    """A method in one policy of precision, and the dtype of peft's weights beside it."""

    method: str
    precision: str
    dtype: str

    @property
    def name(self) -> str:
        """The name of the case in the results."""
        return f"{self.method} {self.precision}"

    @property
    def peft(self) -> str:
        """The name of peft's side."""
        return f"peft {self.method} {self.dtype}"


CASES = (
    Case("lora", "float32", "float32"),
    Case("dora", "float32", "float32"),
    Case("lora", "bf16", "bfloat16"),
    Case("lora", "bf16_f32", "bfloat16"),
)
DTYPES = tuple(dict.fromkeys(case.dtype for case in CASES))


def slowed(before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
    """A line for each case whose ratio to peft fell by more than `SLOWER`, and one if there is nothing to compare."""
    if before is None:
        return [f"there are no results of {after['machine']['processor']}: run make bench first"]
    names = [case.name for case in CASES if case.name in before]
    ratios = {name: (before[name]["ratio"], after[name]["ratio"]) for name in names}
    return [
        f"{name}: peft / ours was {was:.2f} and is {now:.2f}"
        for name, (was, now) in ratios.items()
        if now < (1 - SLOWER) * was
    ]
