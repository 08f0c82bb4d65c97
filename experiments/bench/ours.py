"""This library's side of the step benchmark: answers each line on stdin with one training step (see `step.py`)."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.sides import LENGTH, ROWS
from experiments.bench.worker import serve
from lowrank import data, methods, models, pretrained
from lowrank.adapters import peft
from lowrank.core import sharding, tree, weight
from lowrank.core.compilation_cache import keep_programs
from lowrank.core.typing import Batch
from lowrank.objectives.causal_lm import language_loss
from lowrank.training import optimizer as optim
from lowrank.training import step
from lowrank.training.config import PRECISIONS

MODEL = "smollm2-135m"
OPTIM = optim.OptimConfig(lr=1e-4, clip=0.0)


def main(method_name: str, precision: str, folder: str) -> None:
    """Loads the model, leaves `batch.npz` and the adapter `METHOD-PRECISION` for the other side, then serves steps.

    The compiled program is kept in the folder, where a second process with the same arguments finds it.
    """
    keep_programs(Path(folder) / f"programs-{method_name}-{precision}")
    group = {"name": method_name, "rank": 8, "alpha": 16}
    method, mesh, dtypes = methods.build_method(group), sharding.make_mesh(), PRECISIONS[precision]
    model = {"remat": "dots", "dtype": dtypes["dtype"]}
    base = pretrained.load(
        MODEL, mesh=mesh, rules=sharding.DEFAULT_RULES, model=model, param_dtype=dtypes["param_dtype"]
    )
    params = methods.attach(method, base.params, jax.random.key(0))
    trained, frozen = tree.split(params, weight.declared_mask(params, method.trainable))
    trained, frozen = (jax.device_put(t, sharding.parameter_shardings(t, mesh)) for t in (trained, frozen))
    peft.save(params, base, Path(folder) / f"{method_name}-{precision}", method=group)
    batch = sharding.make_global_batch(_batch(base.tokenizer, Path(folder)), mesh)
    del params, base.params["layers"]

    optimizer = optim.build_optimizer(OPTIM, 1000, trained)
    network = models.build_model(base.config)
    loss = functools.partial(_loss, network)
    state = step.init_state(trained, optimizer, mesh)
    serve(stepping(step.make_step(loss, optimizer, seed=0), state, frozen, batch, np.float32(OPTIM.lr)))


def stepping(plain: Any, state: step.State, frozen: Any, batch: Batch, rate: np.ndarray) -> Callable[[], float]:
    """A function that makes one step and returns its loss; the first call compiles."""
    program = None

    def one_step() -> float:
        nonlocal state, program
        program = program or step.compile_step(plain, state, frozen, batch)
        state, metrics = program(state, frozen, batch, rate)
        return float(metrics["loss"])

    return one_step


def _loss(network, params, batch, rng):
    del rng
    return language_loss(network, params, {**batch, "positions": None, "segments": None})


def _batch(tokenizer: pretrained.Tokenizer, folder: Path) -> dict[str, np.ndarray]:
    """Real text: the first articles of BBC News, one after the other; the last token of a row has no target."""
    articles = data.read_examples(data.DataConfig(source="bbc_news", max_examples=8), tokenizer)
    ids = tokenizer.encode("\n\n".join(a["prompt"] for a in articles))[: ROWS * LENGTH]
    tokens = np.array(ids, np.int32).reshape(ROWS, LENGTH)
    np.savez(folder / "batch.npz", input_ids=tokens, labels=tokens)
    weights = np.ones_like(tokens, np.float32)
    weights[:, -1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
