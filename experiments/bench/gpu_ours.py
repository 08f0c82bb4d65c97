"""A training step of this package on the shapes of a Llama with random weights (a part of `experiments.bench.gpu`).

Only rooms are imported that need neither the data's packages nor a network.
"""

import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu_sizes import TARGETS, VARIANTS, batch_rows, model_flops, report_line, size_of
from lowrank import methods, models, pretrained
from lowrank.core import sharding, tree
from lowrank.core.typing import Sums
from lowrank.kernels.cross_entropy import chunked_nll
from lowrank.pretrained.quantize_config import build_quantizer
from lowrank.training import optimizer, step

OPTIM = optimizer.OptimConfig(lr=1e-4, clip=0.0)
TARGET = rf"layers/(attn|mlp)/({'|'.join(TARGETS)})/kernel"


def main(base: str, method: str, toy: bool) -> None:
    """Prints a JSON line with the step's time, its memory and the loss of each step."""
    size, variant, device = size_of(base, toy), VARIANTS[method], jax.devices()[0]
    chosen = methods.build_method({"name": variant.name, "rank": size.rank, "alpha": 2 * size.rank, "target": TARGET})
    config, _, shapes = pretrained.describe(
        size.folder, {**size.overrides, "dtype": "bfloat16", "remat": "none"}, param_dtype="bfloat16", planned=True
    )
    params = random_parameters(shapes, variant.quantize)
    mesh = sharding.make_mesh_of_devices([device], 1, 1, 1)
    adapted = methods.attach(chosen, params, jax.random.key(1))
    mask = methods.trainable_mask(chosen, adapted)
    trained, frozen = tree.split(jax.device_put(adapted, sharding.parameter_shardings(adapted, mesh)), mask)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    transform = optimizer.build_optimizer(OPTIM, 100, trained)
    network = models.build_model(config)
    state = step.init_state(trained, transform, mesh)
    rows = batch_rows(size, (device.memory_stats() or {}).get("bytes_limit", 0))
    batch = sharding.make_global_batch(random_batch(rows, size.length, config.vocab_size), mesh)
    program = step.compile_step(
        step.make_step(functools.partial(loss, network), transform, seed=0), state, frozen, batch
    )
    seconds, losses = timed(program, state, frozen, batch, size.steps)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    flops = model_flops(config, rows * size.length)
    print(
        report_line(f"{base} {method}", "ours", seconds, rows * size.length, flops, memory, losses, device.device_kind),
        flush=True,
    )


def loss(network: Any, params: Any, batch: Any, rng: Any) -> Sums:
    """The sum of the cross-entropy of all tokens, and their number."""
    del rng
    variables = {"params": params}
    h = network.apply(variables, batch["tokens"], method="features")
    head = functools.partial(network.apply, variables, method="logits")
    return Sums(chunked_nll(head, h, batch["targets"], batch["weights"], 4096), jnp.sum(batch["weights"]))


def random_parameters(shapes: Any, quantize: str | None) -> Any:
    """Normal values of standard deviation 0.02 in each kernel, and 1 in each norm; kernels in codes of a scheme."""
    quantizer = build_quantizer(quantize) if quantize else None
    matches = tree.match_names(quantizer.target, tree.leaf_names(shapes), "target") if quantizer else ()

    def draw(name: str, shape: Any) -> Any:
        if name.endswith("scale"):
            return jnp.ones(shape.shape, shape.dtype)
        x = 0.02 * jax.random.normal(jax.random.key(len(name)), shape.shape, shape.dtype)
        return quantizer.form(x, "bfloat16") if quantizer and name in matches else x

    return tree.map_named(lambda name, shape: jax.jit(draw, static_argnums=(0, 1))(name, shape), shapes)


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Tokens that are drawn uniformly, each the target of the one before."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length)).astype(np.int32)
    weights = np.ones_like(tokens, np.float32)
    weights[:, -1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


def timed(program: Any, state: Any, frozen: Any, batch: Any, steps: int) -> tuple[list[float], list[float]]:
    """`(seconds of each step, its loss)`, without the first two."""
    seconds, losses, rate = [], [], np.float32(OPTIM.lr)
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = program(state, frozen, batch, rate)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return seconds[2:], losses


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
