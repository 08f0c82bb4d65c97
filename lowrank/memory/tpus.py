"""TPU chips as their vendor prints them (cloud.google.com/tpu/docs), and the slices that a compiler takes.

Where a chip is two devices of jax, as of v4 and TPU7x, each device has half of the chip's memory and speed. A v5p chip
is one device with two cores.
"""

import math
from typing import Any, NamedTuple

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
HOST_CHIPS = 4
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


class Tpu(NamedTuple):
    """The figures of one chip."""

    memory: int  # GiB
    peak: int  # TFLOP/s in bfloat16
    bandwidth: int  # of the memory, GB/s
    links: int  # of all its links to other chips together, GB/s in one direction
    layouts: tuple[str, ...]  # of its slices, in chips
    accelerator: str  # the name of the accelerator's type, before the count
    gke: str  # the label of its nodes on GKE
    cores: int = 1  # per chip, in that count
    devices: int = 1  # per chip


TPUS = {
    "v4": Tpu(32, 275, 1228, 300, SOLID, "v4", "tpu-v4-podslice", cores=2, devices=2),
    "v5e": Tpu(16, 197, 819, 200, FLAT, "v5litepod", "tpu-v5-lite-podslice"),
    "v5p": Tpu(95, 459, 2765, 600, SOLID, "v5p", "tpu-v5p-slice", cores=2),
    "v6e": Tpu(32, 918, 1640, 448, FLAT, "v6e", "tpu-v6e-slice"),
    "tpu7x": Tpu(192, 2307, 7380, 600, SOLID, "tpu7x", "tpu7x", cores=2, devices=2),
}


def compile_only_devices(topology: str, slices: int = 1) -> list[Any]:
    """The abstract devices of `slices` slices of a topology such as `v5e:4x4`, to compile for; it loads libtpu."""
    from jax.experimental import topologies

    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    several = {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone, **several)
    return list(found.devices)


def chips(topology: str) -> int:
    """The chips of one slice of a topology such as `v5e:4x4`."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def hosts(topology: str) -> int:
    """The hosts of one slice, which have four chips each; a smaller slice has one host."""
    return max(1, chips(topology) // HOST_CHIPS)


def accelerator_type(topology: str) -> str:
    """The name of a slice where its chips or cores are counted, such as `v5litepod-16` for `v5e:4x4`."""
    tpu = TPUS[topology.partition(":")[0]]
    return f"{tpu.accelerator}-{tpu.cores * chips(topology)}"


def environment(topology: str) -> dict[str, str]:
    """The environment variables of a process that compiles for a TPU slice on a machine without TPUs."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator_type(topology),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process that compiles at the same time is aborted
    }
