"""A run's arrays as shapes: the state, the frozen leaves and a batch, each where the mesh will have it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lowrank.core import parameter_summary, sharding, tree
from lowrank.core.typing import PyTree
from lowrank.training import step
from lowrank.training.offload import HOST
from lowrank.training.run import Run


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a training step is given."""

    state: step.State
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]


def step_inputs(run: Run, batch: dict[str, jax.ShapeDtypeStruct] | None = None) -> StepInputs:
    """The arrays of `run` as shapes with shardings; a batch is as the data's first one unless it is given."""
    optimizer, where = run.optimizer(), sharding.parameter_shardings(run.shapes, run.mesh)
    lifted = jax.tree.map(lambda x, learns: _like(x, "float32") if learns else x, run.shapes, run.mask)
    trained, frozen = tree.split(_placed(lifted, where), run.mask)  # trained in float32, as Plan.attach has it
    moments = step.moment_shapes(trained, optimizer, run.mesh, run.paged)
    done = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated_sharding(run.mesh))
    return StepInputs(step.State(done, trained, moments), frozen, batch or _batch(run))


def rows(batch: dict[str, jax.ShapeDtypeStruct], size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `size` rows, on no device in particular."""
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def device_bytes(shapes: PyTree, kind: str = "") -> int:
    """Bytes that each device holds of arrays with shardings: those in host memory, or all others."""
    leaves = [x for x in jax.tree.leaves(shapes) if (x.sharding.memory_kind == HOST) == (kind == HOST)]
    return math.ceil(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * parameter_summary.bits_per_element(x.dtype) / 8 for x in leaves
        )
    )


def _batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The tokens, even if the method computes features of them once: then the plan is an upper bound."""
    where = NamedSharding(run.mesh, sharding.BATCH)
    return {name: jax.ShapeDtypeStruct(*of, sharding=where) for name, of in run.loader.shapes.items()}


def _like(x: Any, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)


def _placed(shapes: PyTree, where: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
