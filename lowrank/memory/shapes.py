"""The arrays of a run as shapes: the state, the frozen leaves and a batch, with their shardings on the mesh."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import parameter_summary, sharding, tree
from lowrank.core.typing import PyTree
from lowrank.data.row_format import RECORD
from lowrank.kernels import cross_entropy
from lowrank.objectives.objective import REFERENCE, STORED
from lowrank.training import step
from lowrank.training.offload import HOST
from lowrank.training.run import Run


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The arguments of a training step, as shapes with shardings."""

    state: step.State
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]


def step_inputs(run: Run, batch: dict[str, jax.ShapeDtypeStruct] | None = None) -> StepInputs:
    """The arguments of a training step of `run`; the batch has the shapes of the data's unless it is given."""
    optimizer, where = run.optimizer(), sharding.parameter_shardings(run.shapes, run.mesh)
    lifted = jax.tree.map(lambda x, learns: _like(x, "float32") if learns else x, run.shapes, run.mask)
    trained, frozen = tree.split(_with_shardings(lifted, where), run.mask)  # trained in float32, as by Run.attach
    moments = step.moment_shapes(trained, optimizer, run.mesh, run.paged)
    done = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated_sharding(run.mesh))
    reference = trained if run.copied else None
    return StepInputs(step.State(done, trained, moments, reference), frozen, batch or _batch(run))


def with_rows(batch: dict[str, jax.ShapeDtypeStruct], size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `size` rows without shardings."""
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def logits_chunks(run: Run, inputs: StepInputs) -> tuple[int, int]:
    """`(chunks of a microbatch's logits, tokens of a chunk on each device)`; `(1, 0)` for an objective without logits.

    A program leaves out the chunks without any weight.
    """
    if not run.objective.vocabulary_logits:
        return 1, 0
    *rows_of_batch, length = inputs.batch["tokens"].shape
    parts = run.mesh.shape["context"]
    rows, length = math.prod(rows_of_batch) // run.optim.accumulate * parts, length // parts
    chunk = cross_entropy.chunk_length(rows, length, run.logits_chunk_tokens or rows * length)
    return -(-length // chunk), rows * chunk // sharding.num_token_shards(run.mesh)


def head_table(run: Run) -> str:
    """The name, or the start of the names, of the leaves that make the logits."""
    return "embed/embedding" if getattr(run.network.config, "tied", False) else "head/kernel"


def device_bytes(shapes: PyTree, kind: str = "") -> int:
    """The bytes on each device of arrays with shardings: of those in host memory for `HOST`, else of all others."""
    leaves = [x for x in jax.tree.leaves(shapes) if (x.sharding.memory_kind == HOST) == (kind == HOST)]
    return math.ceil(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * parameter_summary.bits_per_element(x.dtype) / 8 for x in leaves
        )
    )


def _batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The tokens, even if the method computes features of them once: the estimate is then an upper bound."""
    per_token = run.objective.row_format.per_token
    where = {n: sharding.batch_sharding(run.mesh, len(of[0]), n in per_token) for n, of in run.loader.shapes.items()}
    batch = {name: jax.ShapeDtypeStruct(*of, sharding=where[name]) for name, of in run.loader.shapes.items()}
    comparison = run.objective.comparison
    if comparison and comparison.reference == STORED:  # a number for each member of a record
        batch[REFERENCE] = jax.ShapeDtypeStruct(batch[RECORD].shape, jnp.float32, sharding=where[RECORD])
    return batch


def _like(x: Any, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)


def _with_shardings(shapes: PyTree, where: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
