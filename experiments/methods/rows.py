"""The methods that are compared: family, config group, and the rate in the middle of the search in each task.

The rates differ by method because the sizes of what is trained do: a factor of (IA)^3 wants a hundred times the step of
a pretrained kernel. A row without a rate for a task is not run there. Slow rows have three seeds in place of five.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
TASKS = ("topics", "headlines")


class Row(NamedTuple):
    """A method, and the options of its base and optimizer."""

    family: str
    method: Mapping[str, Any]
    topics: float | None = None  # the middle one of three rates of `GRID`
    headlines: float | None = None
    model: Mapping[str, Any] = MappingProxyType({})  # in addition to the task's own model options
    optim: Mapping[str, Any] = MappingProxyType({})  # in addition to the task's own optimizer options
    seeds: int = 5

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in which the row is run."""
        return tuple(task for task in TASKS if getattr(self, task))

    def rates(self, task: str) -> tuple[float, ...]:
        """The rates that are tried in a task: one from `GRID`, and its neighbors."""
        i = GRID.index(getattr(self, task))
        return GRID[i - 1 : i + 2]

    @property
    def point(self) -> dict[str, Any]:
        """The keys of the config that the row sets."""
        groups = {"model": self.model, "optim": self.optim}
        more = {f"{group}.{key}": value for group, items in groups.items() for key, value in items.items()}
        return {"method": dict(self.method), **more}


SELECTIVE, LOW_RANK, INTRINSIC = "selective", "reparameterised", "intrinsic dimension"
ADDITIVE, EXPERTS = "additive", "experts"
UPCYCLED = {"upcycle": {"experts": 4, "top_k": 2}}  # no wheel has the weights of a mixture of experts
ROWS: dict[str, Row] = {
    "full": Row(SELECTIVE, {"name": "full"}, topics=3e-4, headlines=3e-4),
    "partial": Row(SELECTIVE, {"name": "partial", "layers": 2}, topics=1e-3),
    "first": Row(SELECTIVE, {"name": "partial", "first": True}, topics=3e-3),
    "chosen": Row(SELECTIVE, {"name": "chosen"}, topics=3e-3),
    "head": Row(SELECTIVE, {"name": "head"}, topics=1e-1),
    "features": Row(SELECTIVE, {"name": "features"}, topics=1e-1),
    "bitfit": Row(SELECTIVE, {"name": "bitfit"}, topics=1e-2, headlines=3e-3),
    "norm": Row(SELECTIVE, {"name": "norm"}, topics=1e-2),
    "sparse": Row(SELECTIVE, {"name": "sparse"}, topics=3e-2),
    "sparse_fisher": Row(SELECTIVE, {"name": "sparse", "choose": "fisher"}, topics=3e-3),
    "sparse_random": Row(SELECTIVE, {"name": "sparse", "choose": "random"}, topics=3e-2),
    "sparse_movement": Row(SELECTIVE, {"name": "sparse", "choose": "movement"}, topics=3e-2),
    "tokens": Row(SELECTIVE, {"name": "tokens", "tokens": ["[CLS]", "[SEP]"]}, topics=1e-1),
    "lora": Row(LOW_RANK, {"name": "lora"}, topics=1e-2, headlines=1e-2),
    "rslora": Row(LOW_RANK, {"name": "lora", "rslora": True}, topics=1e-2, headlines=1e-3),
    "pissa": Row(LOW_RANK, {"name": "lora", "init": "pissa"}, topics=1e-2, headlines=1e-3),
    "olora": Row(LOW_RANK, {"name": "lora", "init": "olora"}, topics=1e-2),
    "lora_plus": Row(LOW_RANK, {"name": "lora"}, topics=3e-3, optim={"b_ratio": 16.0}),
    "lora_fa": Row(LOW_RANK, {"name": "lora_fa"}, topics=3e-2),
    "lora_xs": Row(LOW_RANK, {"name": "lora_xs"}, topics=3e-2),
    "vera": Row(LOW_RANK, {"name": "vera"}, topics=1e-1, headlines=1e-1),
    "adalora": Row(LOW_RANK, {"name": "adalora"}, topics=3e-2, headlines=1e-1),
    "dora": Row(LOW_RANK, {"name": "dora"}, topics=1e-2, headlines=1e-2),
    "edora": Row(LOW_RANK, {"name": "edora"}, topics=3e-2),
    "bidora": Row(LOW_RANK, {"name": "bidora"}, topics=3e-2),
    "loha": Row(LOW_RANK, {"name": "loha"}, topics=3e-2),
    "lokr": Row(LOW_RANK, {"name": "lokr"}, topics=3e-2),
    "hira": Row(LOW_RANK, {"name": "hira"}, topics=3e-2),
    "oft": Row(LOW_RANK, {"name": "oft"}, topics=1e-2),
    "boft": Row(LOW_RANK, {"name": "boft"}, topics=1e-2),
    "relora": Row(LOW_RANK, {"name": "relora"}, topics=1e-2),
    "galore": Row(LOW_RANK, {"name": "galore", "every": 12}, topics=1e-3),
    "longlora": Row(LOW_RANK, {"name": "longlora", "group": 16}, headlines=3e-3),
    "ia3": Row(LOW_RANK, {"name": "ia3"}, topics=1e-1, headlines=1e-2),
    "houlsby": Row(ADDITIVE, {"name": "houlsby"}, topics=3e-3, headlines=3e-3),
    "pfeiffer": Row(ADDITIVE, {"name": "pfeiffer"}, topics=1e-2),
    "parallel": Row(ADDITIVE, {"name": "parallel"}, topics=1e-2),
    "scaled_parallel": Row(ADDITIVE, {"name": "scaled_parallel"}, topics=3e-3),
    "intrinsic": Row(INTRINSIC, {"name": "intrinsic"}, topics=1e-1, seeds=3),
    "intrinsic_said": Row(INTRINSIC, {"name": "intrinsic", "said": True}, topics=1e-1, seeds=3),
    "prefix": Row(ADDITIVE, {"name": "prefix"}, topics=1e-1, headlines=1e-1),
    "prefix_mlp": Row(ADDITIVE, {"name": "prefix", "reparam": True}, topics=3e-3),
    "mam": Row(ADDITIVE, {"name": "mam"}, topics=3e-3, headlines=1e-2),
    "prompt": Row(ADDITIVE, {"name": "prompt"}, topics=3e-1, headlines=1e-1),
    "ptuning": Row(ADDITIVE, {"name": "ptuning"}, topics=3e-2),
    "ptuning_lstm": Row(ADDITIVE, {"name": "ptuning", "encoder": "lstm"}, topics=1e-1),
    "more": Row(EXPERTS, {"name": "more"}, topics=1e-2),
    "milora": Row(EXPERTS, {"name": "milora"}, topics=1e-2),
    "smore": Row(EXPERTS, {"name": "smore"}, topics=3e-2),
    "perft": Row(EXPERTS, {"name": "perft"}, headlines=3e-2, model=UPCYCLED, seeds=3),
    "esft": Row(EXPERTS, {"name": "esft"}, headlines=3e-4, model=UPCYCLED, seeds=3),
}
