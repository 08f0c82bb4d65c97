"""The devices that a run may be estimated for: the memory of each device, and the TPU slices that exist."""

import math
import os
from typing import Any, NamedTuple

from lowrank.core.errors import UserError, unknown

GIB = 2**30
# The memory that the vendor prints, in GiB, of which a driver reserves a little.
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
ACCELERATORS = {"v5e": ("v5litepod", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2)}  # (name, cores per chip in its count)


class Target(NamedTuple):
    """The devices that a run is estimated for: `num_devices` devices with `memory` bytes each."""

    name: str
    memory: int
    num_devices: int
    topology: str = ""  # of a TPU slice to compile for


def parse_topology(text: str) -> Target:
    """The TPU slice of a topology such as `v5e:4x4`. Raises UserError for a slice that does not exist."""
    kind, _, layout = text.partition(":")
    if kind not in SLICES or layout not in SLICES[kind]:
        near = SLICES.get(kind)
        raise unknown("topology", text, [f"{k}:{s}" for k in ([kind] if near else SLICES) for s in SLICES[k]])
    return Target(text, MEMORY[kind] * GIB, math.prod(map(int, layout.split("x"))), text)


def parse_device(text: str) -> Target:
    """The devices of `h100`, or of `h100:8` for eight. Raises UserError for a device that is not in the table."""
    name, colon, count = text.partition(":")
    if name not in MEMORY:
        raise unknown("device", name, MEMORY)
    if colon and not (count.isdecimal() and 0 < int(count) <= 64):
        raise UserError(f"--device={text}: the number of devices, after the colon, must be an integer from 1 to 64")
    return Target(text, MEMORY[name] * GIB, int(count) if colon else 1)


def local_target(devices: list[Any]) -> Target:
    """The devices of this machine, with the memory that the first reports, or else a share of the machine's memory."""
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return Target(f"this machine's {devices[0].device_kind}", memory, len(devices))


def tpu_environment(target: Target) -> dict[str, str]:
    """The environment variables of a process that compiles for a TPU slice on a machine without TPUs."""
    prefix, cores = ACCELERATORS[target.topology.partition(":")[0]]
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{prefix}-{cores * target.num_devices}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process that compiles at the same time is aborted
    }
