"""Rounds of federated training: every client trains from the server's model, and the server averages what they learned.

The moments of the optimizer start anew in every round.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank import methods
from lowrank.core import tree
from lowrank.core.typing import Batch, Network, PyTree
from lowrank.core.weight import is_weight, materialize
from lowrank.merging import federated
from lowrank.merging.factors import Factors
from lowrank.models import build_model
from lowrank.objectives import build_objective
from lowrank.pretrained import Pretrained
from lowrank.weights.lora import LoRA

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
CLASSIFICATION = build_objective("classification")
LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r"layers/attn/(q|v)/kernel"}
Batches = Iterator[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: what clients train, and how the server averages it; `aggregate` is of `AGGREGATIONS`."""

    name: str
    rate: float
    aggregate: str = ""  # "": the mean of every trained leaf
    method: Mapping[str, Any] = dataclasses.field(default_factory=lambda: LORA)
    pooled: bool = False  # one client has all records


ROWS = (
    Row("all records in one place", 3e-3, "fedit", pooled=True),
    Row("FedAvg of the full model", 3e-4, method={"name": "full"}),
    Row("FedIT", 3e-3, "fedit"),
    Row("FFA-LoRA", 3e-3, "ffa_lora"),
    Row("FLoRA", 3e-3, "flora"),
    Row("FedEx-LoRA", 3e-3, "fedex"),
)


@dataclasses.dataclass(frozen=True)
class State:
    """The server's model, and the relative size of the gap of its last average."""

    params: PyTree
    gap: float = 0.0


def start(base: Pretrained, row: Row, seed: int) -> State:
    """The model before the first round."""
    return State(methods.attach(methods.build_method(row.method), base.params, jax.random.key(seed)))


def run_round(
    state: State, row: Row, base: Pretrained, clients: Sequence[Batches], samples: Sequence[int], steps: int, seed: int
) -> State:
    """One round: `steps` of every client, and the average weighted by `samples`; `seed` draws what starts anew."""
    weights = federated.sample_weights(samples)
    method, network = methods.build_method(row.method), build_model(base.config)
    mask = methods.trainable_mask(method, state.params, CLASSIFICATION.trainable)
    if row.aggregate == "ffa_lora":
        mask = tree.map_named(lambda name, learns: learns and not name.endswith("/kernel/a"), mask)
    found = [_train(network, state.params, mask, batches, steps, row.rate) for batches in clients]
    return average(state, found, weights, row, seed)


def _train(network: Network, params: PyTree, mask: PyTree, batches: Batches, steps: int, rate: float) -> PyTree:
    trained, frozen = tree.split(params, mask)
    moments = OPTIMIZER.init(trained)
    for _ in range(steps):
        trained, moments = _step(network, trained, moments, frozen, dict(next(batches)), jnp.float32(rate))
    return tree.join(trained, frozen)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    network: Network, trained: PyTree, moments: PyTree, frozen: PyTree, batch: Batch, rate: jax.Array
) -> tuple[PyTree, PyTree]:
    def loss(trained: PyTree) -> jax.Array:
        sums = CLASSIFICATION.loss(network, tree.join(trained, frozen), batch, 0)
        return sums.total / sums.weight

    updates, moments = OPTIMIZER.update(jax.grad(loss)(trained), moments)
    return jax.tree.map(lambda x, u: x - rate * u, trained, updates), moments


def average(state: State, clients: Sequence[PyTree], weights: Sequence[float], row: Row, seed: int) -> State:
    """The server's next model: adapters by the row's rule, and every other leaf by its mean."""
    sizes = [0.0, 0.0]  # squares of the gap and of the mean update

    def merged(name: str, old: Any, *new: Any) -> Any:
        del name
        if isinstance(old, LoRA):
            return _merge_forms(new, weights, row.aggregate, sizes)
        if all(x is old for x in new):
            return old
        return jnp.asarray(federated.average([np.asarray(x) for x in new], weights), old.dtype)

    params = tree.map_named(merged, state.params, *clients, is_leaf=is_weight)
    if row.aggregate == "flora":
        params = methods.attach(methods.build_method(row.method), params, jax.random.key(seed))
    return State(params, (sizes[0] / sizes[1]) ** 0.5 if sizes[1] else 0.0)


def _merge_forms(forms: Sequence[LoRA], weights: Sequence[float], rule: str, sizes: list[float]) -> Any:
    """The stacked form `[L, in, out]` of the next round; a plain kernel where new factors follow."""
    base = np.asarray(materialize(forms[0].base), np.float64)
    a, b, scales = np.array(forms[0].a), np.array(forms[0].b), np.broadcast_to(forms[0].scale, len(base))
    anew = False
    for layer, scale in enumerate(scales):
        of = [
            Factors(np.asarray(f.a[layer], np.float64), float(scale) * np.asarray(f.b[layer], np.float64))
            for f in forms
        ]
        sizes[0] += federated.norm(federated.gap(of, weights)) ** 2
        sizes[1] += federated.norm(federated.mean_update(of, weights)) ** 2
        result = federated.AGGREGATIONS[rule](of, weights)
        if result.base_change:
            base[layer] += result.base_change.a @ result.base_change.b
        if result.factors:
            a[layer], b[layer] = result.factors.a, result.factors.b / scale
        anew = result.factors is None
    kernel = jnp.asarray(base, jnp.float32)
    return kernel if anew else dataclasses.replace(forms[0], base=kernel, a=jnp.asarray(a), b=jnp.asarray(b))
