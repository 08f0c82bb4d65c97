"""The devices that a run may be estimated for: the memory of each device, and the TPU slices that exist."""

import os
from typing import Any, NamedTuple

from lowrank.core.errors import UserError, unknown
from lowrank.memory import tpus

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
    **{name: tpu.memory for name, tpu in tpus.TPUS.items()},
}


class Target(NamedTuple):
    """The devices that a run is estimated for: `num_devices` devices with `memory` bytes each."""

    name: str
    memory: int
    num_devices: int
    topology: str = ""  # of a TPU slice to compile for
    slices: int = 1

    @property
    def tpu(self) -> tpus.Tpu | None:
        """The figures of the chips of a TPU slice; None for other devices."""
        return tpus.TPUS[self.topology.partition(":")[0]] if self.topology else None


def parse_topology(text: str) -> Target:
    """The devices of `v5e:4x4`, or of several such slices, `v5e:4x4,slices=2`.

    Raises UserError for a slice that does not exist.
    """
    topology, comma, slices = text.partition(",")
    kind, _, layout = topology.partition(":")
    if kind not in tpus.TPUS or layout not in tpus.TPUS[kind].layouts:
        near = [kind] if kind in tpus.TPUS else tpus.TPUS
        raise unknown("topology", topology, [f"{k}:{s}" for k in near for s in tpus.TPUS[k].layouts])
    count = slices.removeprefix("slices=")
    if comma and not (slices.startswith("slices=") and count.isdecimal() and 0 < int(count) <= 64):
        raise UserError(f"--topology={text}: after the comma comes slices=N, N from 1 to 64")
    tpu, number = tpus.TPUS[kind], int(count) if comma else 1
    total = number * tpus.chips(topology) * tpu.devices
    return Target(text, tpu.memory * GIB // tpu.devices, total, topology, number)


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
