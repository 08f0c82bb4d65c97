"""The kernels of a GPU in torch, eager and compiled, and bitsandbytes' NF4 (a part of `experiments.bench.gpu`)."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

SCALE, SECONDS, ROUNDS = 2.0, 0.05, 5
Sizes = tuple[int, ...]


def main(toy: bool) -> None:
    """Prints a JSON line per result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"versions": {"torch": torch.__version__}}), flush=True)
    sizes = {"lora": (100, 192, 320, 7)} if toy else LORA
    for name, size in sizes.items():
        given = lora_inputs(size, device)
        for form, call in (("torch", lora), ("torch compiled", torch.compile(lora))):
            if form == "torch" or not toy:
                print(json.dumps({"kernels": {name: {form: times(call, given)}}}), flush=True)
    for name, (T, d, k) in ({"nf4": (33, 192, 320)} if toy else NF4).items():
        found = {"forward": measure(nf4(T, d, k, device))}
        print(json.dumps({"kernels": {name: {"bitsandbytes": found}}}), flush=True)


LORA: Mapping[str, Sizes] = {
    "lora 8192x4096x4096 r16": (8192, 4096, 4096, 16),
    "lora 8192x4096x14336 r16": (8192, 4096, 14336, 16),
    "lora 8192x14336x4096 r16": (8192, 14336, 4096, 16),
    "lora 8192x2048x2048 r16": (8192, 2048, 2048, 16),
    "lora 8192x4096x4096 r64": (8192, 4096, 4096, 64),
}
NF4: Mapping[str, Sizes] = {
    "nf4 16x4096x14336": (16, 4096, 14336),
    "nf4 64x4096x4096": (64, 4096, 4096),
    "nf4 8192x4096x4096": (8192, 4096, 4096),
    "nf4 8192x4096x14336": (8192, 4096, 14336),
}


def lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`x W + s (x A) B`, the second product added to the first by one kernel."""
    return torch.addmm(x @ w, x @ a, b, alpha=SCALE)


def lora_inputs(size: Sizes, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random inputs in bfloat16, of which the kernel gets no gradient."""
    T, d, k, r = size
    shapes = ((T, d), (d, k), (d, r), (r, k))
    drawn = [torch.randn(*shape, device=device).to(torch.bfloat16) / shape[0] ** 0.5 for shape in shapes]
    return tuple(x.requires_grad_(i != 1) for i, x in enumerate(drawn))


def nf4(T: int, d: int, k: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """The product of T rows with a kernel in codes."""
    import bitsandbytes as bnb

    w = torch.randn(k, d, device=device).to(torch.bfloat16) / d**0.5
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    x = torch.randn(T, d, device=device).to(torch.bfloat16)
    return lambda: bnb.matmul_4bit(x, packed.t(), state)


def times(call: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Milliseconds forward alone and with the backward pass."""
    g = torch.randn_like(call(*given))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call(*given)

    def both() -> Any:
        return torch.autograd.grad(call(*given), [x for x in given if x.requires_grad], g)

    return {"forward": measure(forward), "both": measure(both)}


def measure(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call among many that are sent to the device without waiting: median and range of the rounds."""
    for _ in range(3):  # compiles and warms up
        once = _timed(call, 1)
    count = max(1, int(SECONDS / max(once, 1e-6)))
    rounds = sorted(1e3 * _timed(call, count) / count for _ in range(ROUNDS))
    return {"median": rounds[ROUNDS // 2], "least": rounds[0], "most": rounds[-1], "calls": count}


def _timed(call: Callable[[], Any], count: int) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
