"""The devices that a run may be planned for: how much memory each has, and the TPU slices that one can ask for."""

import math
import os
from typing import Any, NamedTuple

from lowrank.core.errors import UserError, unknown

GIB = 2**30
# What the vendor prints, in GiB; a driver keeps a little of it.
MEMORY = {
    "t4": 16,
    "l4": 24,
    "v100": 32,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "a10": 24,
    "a40": 48,
    "a6000": 48,
    "l40s": 48,
    "a100": 80,
    "a100-40": 40,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "v2": 8,
    "v3": 16,
    "v4": 32,
    "v5e": 16,
    "v5p": 95,
    "v6e": 32,
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": SOLID}
ACCELERATORS = {"v5e": ("v5litepod", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2)}  # and how many cores of a chip it counts


class Target(NamedTuple):
    """What a run is planned for: `count` devices with `memory` bytes each."""

    name: str
    memory: int
    count: int
    topology: str = ""  # of TPUs, to compile for


def topology(text: str) -> Target:
    """`v5e:4x4`. Raises UserError for a slice that does not exist, with those that do."""
    kind, _, layout = text.partition(":")
    if kind not in SLICES or layout not in SLICES[kind]:
        near = SLICES.get(kind)
        raise unknown("topology", text, [f"{k}:{s}" for k in ([kind] if near else SLICES) for s in SLICES[k]])
    return Target(text, MEMORY[kind] * GIB, math.prod(map(int, layout.split("x"))), text)


def device(text: str) -> Target:
    """`h100`, or `h100:8` for eight of them. Raises UserError for a device that is not in the table."""
    name, colon, count = text.partition(":")
    if name not in MEMORY:
        raise unknown("device", name, MEMORY)
    if colon and not (count.isdecimal() and 0 < int(count) <= 64):
        raise UserError(f"--device={text}: how many, after the colon, is a number from 1 to 64")
    return Target(text, MEMORY[name] * GIB, int(count) if colon else 1)


def here(devices: list[Any]) -> Target:
    """The devices that jax has: what one says of its memory, or a share of this machine's."""
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return Target(f"this machine's {devices[0].device_kind}", memory, len(devices))


def tpu_environment(target: Target) -> dict[str, str]:
    """What a process needs to compile for a slice without being on one."""
    prefix, cores = ACCELERATORS[target.topology.partition(":")[0]]
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{prefix}-{cores * target.count}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
