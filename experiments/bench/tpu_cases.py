"""The runs that are planned for TPU slices: each is a command of `launch.preflight`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lowrank.memory import tpus

BASES = Path("experiments/bench/bases")  # configs alone, without weights
# The method's part of the config's argument, and further changes of the config.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("method=lora,rank=16", ()),
    "dora": ("method=dora,rank=16", ()),
    "qlora": ("method=lora,rank=16", ("model.quantize=nf4",)),
    "qlora int4": ("method=lora,rank=16", ("model.quantize=int4",)),
    "prompt": ("method=prompt,length=20", ()),
    "full": ("method=full", ()),
}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8")


class Case(NamedTuple):
    """A run of `rows` rows of `length` tokens on a slice; the step of a `required` case is always compiled."""

    base: str
    method: str
    topology: str
    rows: int
    length: int
    mesh: Mapping[str, int]
    required: bool = False

    @property
    def key(self) -> str:
        """The name of the case in the results."""
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        return f"{self.base} {self.method} {self.topology} {axes} {self.rows}x{self.length}"

    @property
    def words(self) -> list[str]:
        """The arguments of `python -m launch.preflight`."""
        argument, changes = METHODS[self.method]
        mesh = [f"mesh.{axis}={size}" for axis, size in self.mesh.items() if size > 1]
        data = [f"data.seq_len={self.length}", f"data.batch_size={self.rows}"]
        changes = (f"model.name={BASES / self.base}", "optim.b_ratio=1.0", *changes, *data, *mesh)
        config = f"--config=configs/llama_sft_jsonl.py:{argument}"
        return [config, *(f"--config.{change}" for change in changes), f"--topology={self.topology}"]


def cases() -> list[Case]:
    """All cases, each once: the methods, then attention at length, then the models."""
    found: dict[str, Case] = {}
    for case in (*method_cases(), *attention_cases(), *model_cases()):
        found.setdefault(case.key, case)
    return list(found.values())


def method_cases() -> Iterator[Case]:
    """Every method on Llama-3.1-8B, sharded in two ways, and QLoRA on the model of 70 billion parameters."""
    for method in METHODS:
        yield Case("llama-3.1-8b", method, "v5e:4x4", 16, 2048, {"fsdp": 16}, required=True)
        yield Case("llama-3.1-8b", method, "v5e:4x4", 16, 2048, {"fsdp": 4, "tensor": 4}, required=True)
    yield Case("llama-3.1-70b", "qlora", "v5e:4x4", 16, 2048, {"fsdp": 16}, required=True)


def attention_cases() -> Iterator[Case]:
    """LoRA on Llama-3.1-8B at four lengths: 16 rows; then one row in each shard of the rows, on four or fewer shards.

    There are fewer where four would leave a chip more than 8192 tokens.
    """
    for topology in TOPOLOGIES:
        size = tpus.chips(topology)
        for length in (2048, 8192):
            fsdp = min(16, size)
            yield Case("llama-3.1-8b", "lora", topology, 16, length, {"fsdp": fsdp, "context": size // fsdp})
        for length in (32768, 131072):
            context = max(size // 4, length // 8192)
            mesh = {"fsdp": size // context, "context": context}
            yield Case("llama-3.1-8b", "lora", topology, size // context, length, mesh)


def model_cases() -> Iterator[Case]:
    """Four models and four methods on four slices, a row of 2048 tokens on each chip."""
    for base in ("smollm2-135m", "gemma-3-1b", "llama-3.1-8b", "llama-3.1-70b"):
        for method in ("lora", "dora", "qlora", "full"):
            for topology in TOPOLOGIES:
                size = tpus.chips(topology)
                yield Case(base, method, topology, size, 2048, {"fsdp": size})
