"""The least time that a step takes by the figures of its chips: a bound, never a measured time.

Each of three times is what one resource needs if nothing else held it up: the matrix units for the operations by
formula, the memory for reading the base once a pass, and the links for the bytes of the collectives.
"""

import dataclasses
import math

from lowrank.memory.devices import Target
from lowrank.memory.flops import Flops
from lowrank.memory.formulas import Memory
from lowrank.training.run import Run


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, and the share of the chips' peak that the model's operations reach at best."""

    compute: float
    memory: float
    links: float
    mfu: float

    @property
    def step(self) -> float:
        """The largest of the times: each resource works while the others do."""
        return max(self.compute, self.memory, self.links)


def bound(target: Target, run: Run, flops: Flops, formula: Memory, moved: int) -> Roofline | None:
    """The bound of `run` on `target`, whose step moves `moved` bytes between its devices.

    None where the figures of the target's chips are not in the table.
    """
    tpu = target.tpu
    if not tpu:
        return None
    peak, devices = 1e12 * tpu.peak / tpu.devices, run.mesh.size
    gathered = math.prod(run.mesh.shape.get(axis, 1) for axis in ("fsdp", "context"))  # each device reads all shards
    passes = run.optim.accumulate * (3 if flops.recomputed else 2)
    read = passes * gathered * (formula.weights + formula.adapter) + 2 * formula.moments
    compute = flops.executed / (devices * peak)
    memory, links = read / (1e9 * tpu.bandwidth / tpu.devices), moved / (1e9 * tpu.links / tpu.devices)
    return Roofline(compute, memory, links, flops.model / (devices * peak) / max(compute, memory, links))
