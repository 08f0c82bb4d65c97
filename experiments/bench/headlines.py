"""Our side of the benchmark of answers: a step of the studies' task `headlines` for each line on stdin."""

import json
import sys
from pathlib import Path

import numpy as np

from experiments.bench.ours import stepping
from experiments.bench.worker import serve
from experiments.protocol import tasks
from lowrank.adapters import adapter_files
from lowrank.core import sharding, tree
from lowrank.core.typing import Batch
from lowrank.training import build

IGNORED = -100  # the label that torch's loss leaves out


def main(rows: int, folder: str) -> None:
    """Loads the run, with `rows` tokens of the head at a time; leaves its start for the other side, then serves."""
    config = tasks.headlines()
    config.method, config.data.batch_size, config.logits_chunk_tokens = {"name": "lora"}, 8, rows
    config.optim.update(lr=1e-4, schedule="constant", warmup=0, clip=0.0)  # as theirs
    run = build.build_run(config)
    base, optimizer = run.load(), run.optimizer()
    state, frozen, _ = run.start(base.params, optimizer)
    batch = dict(next(run.loader))
    batch["weights"] = np.array(batch["weights"])
    batch["weights"][:, -1] = 0  # the token after the row's last one is not among their labels
    adapted = tree.join(state.trained, frozen)
    adapter_files.save(adapted, base, Path(folder) / "lora", mask=run.mask, method=config.method.to_dict())
    np.savez(Path(folder) / "batch.npz", **_theirs(batch))
    del base, adapted
    batch = sharding.make_global_batch(batch, run.mesh)
    serve(stepping(run.step(optimizer), state, frozen, batch, run.learning_rates[0]))


def _theirs(batch: Batch) -> dict[str, np.ndarray]:
    """The batch as transformers takes it: labels stand with the token that they are, not with the one before."""
    labels = np.full_like(batch["tokens"], IGNORED)
    labels[:, 1:] = np.where(batch["weights"] > 0, batch["targets"], IGNORED)[:, :-1]
    return {"input_ids": batch["tokens"], "attention_mask": np.int32(batch["segments"] > 0), "labels": labels}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
