"""NVIDIA's GPUs as XLA describes them, to compile on a machine without one (`pip install 'jax[cuda12-local]'`).

Attention is then XLA's own: that of cuDNN, which a real device may have, takes less memory.
"""

import importlib.util
from typing import Any, NamedTuple

from lowrank.core.errors import UserError


class Gpu(NamedTuple):
    """The figures of the vendor's data sheet, by which the compiler chooses kernels."""

    name: str
    capability: str
    cores: int  # the number of streaming multiprocessors
    bandwidth: int  # of the memory, GB/s
    cache: int  # L2, MiB
    clock: float  # GHz


GPUS = {
    "t4": Gpu("Tesla T4", "7.5", 40, 320, 4, 1.59),
    "l4": Gpu("NVIDIA L4", "8.9", 58, 300, 48, 2.04),
    "v100": Gpu("Tesla V100-SXM2-32GB", "7.0", 80, 900, 6, 1.53),
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060", "8.6", 28, 360, 3, 1.78),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", "8.6", 82, 936, 6, 1.70),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 1008, 72, 2.52),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", "12.0", 170, 1792, 96, 2.41),
    "a10": Gpu("NVIDIA A10", "8.6", 72, 600, 6, 1.70),
    "a40": Gpu("NVIDIA A40", "8.6", 84, 696, 6, 1.74),
    "a6000": Gpu("NVIDIA RTX A6000", "8.6", 84, 768, 6, 1.80),
    "l40s": Gpu("NVIDIA L40S", "8.9", 142, 864, 96, 2.52),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 2039, 40, 1.41),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 108, 1555, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 3352, 50, 1.98),
    "h200": Gpu("NVIDIA H200", "9.0", 132, 4800, 50, 1.98),
    "b200": Gpu("NVIDIA B200", "10.0", 148, 8000, 126, 1.97),
}
# Compute capability -> (threads per core, shared memory per core in KiB, largest shared memory of a block in KiB).
LIMITS = {
    "7.0": (2048, 96, 96),
    "7.5": (1024, 64, 64),
    "8.0": (2048, 164, 163),
    "8.6": (1536, 100, 99),
    "8.9": (1536, 100, 99),
    "9.0": (2048, 228, 227),
    "10.0": (2048, 228, 227),
    "12.0": (1536, 100, 99),
}


def has_compiler() -> bool:
    """Whether XLA's compiler for NVIDIA's GPUs is installed."""
    return bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12"))


def compile_only_devices(name: str, count: int, memory: int) -> list[Any]:
    """`count` abstract devices of one machine to compile for: `name`, a key of `GPUS`, with `memory` bytes each.

    Raises UserError if XLA cannot compile for them.
    """
    from jax.experimental import topologies

    config = target_config(GPUS[name], memory)
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{count}")
    except RuntimeError as e:
        raise UserError(f"XLA cannot compile for {name} on this machine: {e}; leave --device out, or run there") from e
    return list(topology.devices)


def target_config(gpu: Gpu, memory: int) -> str:
    """XLA's `GpuTargetConfigProto` of a device, in protobuf's text format."""
    major, minor = gpu.capability.split(".")
    threads, shared, block = LIMITS[gpu.capability]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared * 1024,
        "shared_memory_per_block_optin": block * 1024,
        "threads_per_core_limit": threads,
        "core_count": gpu.cores,
        "fpus_per_core": 64 if gpu.capability in ("7.0", "7.5", "8.0") else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": gpu.bandwidth * 10**9,
        "l2_cache_size": gpu.cache * 2**20,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    fields = " ".join(f"{key}: {value}" for key, value in info.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    libraries = "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }"
    return (
        f"gpu_device_info {{ {fields} {capability} }} "
        f'platform_name: "CUDA" {libraries} device_description_str: "{gpu.name}"'
    )
