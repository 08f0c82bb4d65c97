"""The literature's figures of memory, each beside what our formulas give for the model's shapes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.plan.formatting import aligned
from experiments.plan.paper_models import MODELS
from lowrank import methods, models
from lowrank.core import config_schema, parameter_summary, sharding
from lowrank.memory import formulas
from lowrank.memory.shapes import StepInputs, device_bytes, step_inputs
from lowrank.objectives import causal_lm
from lowrank.pretrained import quantize_config
from lowrank.training.config import CheckpointConfig, ModelConfig, RunConfig
from lowrank.training.optimizer import OptimConfig
from lowrank.training.run import Run

SAME = 0.05  # how far a rounded figure may be from ours
LINEAR = r"layers/(attn|mlp)/(q|k|v|o|gate|up|down)/kernel"


class Figure(NamedTuple):
    """A figure as its source prints it (`said`, in `unit`), and as the formulas give it (`ours`)."""

    what: str
    said: float
    ours: float
    unit: str
    source: str
    note: str = ""


def plan(name: str, method: Mapping[str, Any], quantized: Any = None, **options: Any) -> Run:
    """A run of a paper's model that has no data and is never started, with bfloat16 weights."""
    found = methods.build_method(method)
    config = config_schema.replace_fields(
        MODELS[name], {"dtype": "bfloat16", **options, **found.model_options}, "model"
    )
    network, tokens = models.build_model(config), jnp.zeros((1, 1), jnp.int32)
    base = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens))["params"]
    base = cast(base, "bfloat16")
    if quantized:
        base = quantize_config.quantized_shapes(
            quantize_config.build_quantizer(quantized), base, lambda _: False, lambda _: (), lambda _: iter(())
        )
    shapes = jax.eval_shape(lambda params: methods.attach(found, params, jax.random.key(0)), base)
    return Run(
        config=RunConfig(steps=1, model={"name": name}, method=method, data={}),
        objective=causal_lm(),
        method=found,
        model=ModelConfig(name, "bfloat16", quantized),
        options={},
        network=network,
        optim=OptimConfig(),
        checkpoint=CheckpointConfig(),
        loader=None,
        scorer=None,
        mesh=sharding.make_mesh(1, 1, 1),
        shapes=shapes,
        mask=methods.trainable_mask(found, shapes),
        table="",
        tokens_per_step=0,
        tokenizer=None,
    )


def arrays(run: Run, rows: int = 1, length: int = 512) -> StepInputs:
    """The arguments of a step of `run` on a batch of `rows` rows of `length` tokens."""
    where = sharding.replicated_sharding(run.mesh)
    whole = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32)
    whole |= {"weights": jnp.float32, "prompt": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=where) for name, kind in whole.items()}
    return step_inputs(run, batch)


def cast(shapes: Any, dtype: Any) -> Any:
    """The same shapes in another number format; integers, such as the step of an optimizer, stay."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        kind = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding)

    return jax.tree.map(one, shapes)


def figures() -> list[Figure]:
    """All figures of the literature."""
    return [*_precision(), *_full(), *_adapters(), *_qlora()]


def _precision() -> list[Figure]:
    source = "bits x parameters, as lectures have it"
    run = plan("Llama-2-13B", {"name": "lora", "rank": 2})
    frozen = arrays(run).frozen
    kinds = (
        ("float32", 52, jnp.float32),
        ("16 bits", 26, jnp.bfloat16),
        ("8 bits", 13, jnp.int8),
        ("4 bits", 6.5, "int4"),
    )
    found = [
        Figure(f"13B weights, {name}", said, device_bytes(cast(frozen, kind)) / 1e9, "GB", source)
        for name, said, kind in kinds
    ]
    for scheme, said in (({"name": "int8"}, 13), ({"name": "nf4", "double": True}, 6.5)):
        stored = arrays(plan("Llama-2-13B", {"name": "lora", "rank": 2}, scheme)).frozen
        note = "with scales; embeddings, head and norms in bfloat16"
        found.append(
            Figure(f"13B weights, {scheme['name']} base", said, device_bytes(stored) / 1e9, "GB", source, note)
        )
    c, weights = run.network.config, device_bytes(frozen)
    cache = 2 * c.layers * c.max_length * c.kv_heads * c.head_dim * 2
    note = f"weights and the keys and values of {c.max_length} tokens, nothing else"
    return [*found, Figure("13B inference over weights", 1.2, 1 + cache / weights, "x", "Transformer Math 101", note)]


def _full() -> list[Figure]:
    source = "Transformer Math 101, 16-bit gradients and moments"
    found = []
    for name, said in (("LLaMA-7B", 42), ("Llama-2-13B", 78)):
        r = arrays(plan(name, {"name": "full"}))
        if said == 42:
            weights = device_bytes(cast(r.state.trained, "bfloat16"))
            found.append(Figure("7B full, weights", 14, weights / 1e9, "GB", source, "7B is 6.74B"))
        found.append(Figure(f"{name.split('-')[-1]} full, gradients and Adam", said, _learning(r) / 1e9, "GB", source))
    r = arrays(plan("Llama-2-13B", {"name": "partial", "layers": 3}))
    note = "the last three layers: 0.95B"
    found.append(Figure("13B, 1B trained, gradients and Adam", 6, _learning(r) / 1e9, "GB", source, note))
    r = arrays(plan("LLaMA-65B", {"name": "full"}))
    whole = 2 * device_bytes(cast(r.state.trained, "bfloat16")) + device_bytes(r.state.optimizer)
    note = "16-bit weights and gradients, float32 moments; printed as 'more than'"
    return [*found, Figure("65B full, 16 bits", 780, whole / 1e9, "GB", "arXiv:2305.14314", note)]


def _learning(r: StepInputs) -> int:
    """The bytes of gradients and moments at 16 bits."""
    return device_bytes(cast((r.state.trained, r.state.optimizer), "bfloat16"))


def _adapters() -> list[Figure]:
    def held(name: str) -> float:
        method = {"name": "lora", "rank": 2, "target": "layers/attn/(q|k|v|o)/kernel"}
        trained = cast(arrays(plan(name, method)).state.trained, "bfloat16")
        return (
            sum(
                x.size * parameter_summary.bits_per_element(x.dtype) / 8
                for x in jax.tree.leaves(trained)
                if x.ndim == 3
            )
            / 1e6
        )

    kernel = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    method = methods.build_method({"name": "lora", "rank": 8, "target": "kernel"})
    shapes = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), kernel)
    sums = parameter_summary.count_parameters(shapes, methods.trainable_mask(method, shapes))
    own, base = sums["trained_params"], sums["total_params"] - sums["trained_params"]
    lecture = "lecture notes"
    return [
        Figure("Llama-2-13B, LoRA 2 on q, k, v, o, 16 bits", 6.55, held("Llama-2-13B"), "MB", lecture),
        Figure("GPT-3, LoRA 2 on q, k, v, o, 16 bits", 37.7, held("GPT-3 175B"), "MB", "arXiv:2106.09685"),
        Figure("100 copies of a 4096 x 4096 kernel", 1680, 100 * base / 1e6, "M parameters", lecture),
        Figure("one and 100 adapters of rank 8", 23.3, (base + 100 * own) / 1e6, "M parameters", lecture),
    ]


def _qlora() -> list[Figure]:
    method = {"name": "lora", "rank": 64, "target": LINEAR}
    run = plan("LLaMA-65B", method, {"name": "nf4", "double": True})
    paged = dataclasses.replace(run, optim=OptimConfig(paged=True))
    source = "arXiv:2305.14314: fits one 48 GB device"
    note = "rank 64 everywhere, one row of 512 tokens; float32 adapter and gradients"

    def figure(where: str, run: Run) -> Figure:
        needed = formulas.estimate_memory(run, arrays(run)).step / 1e9
        return Figure(f"65B QLoRA, moments on the {where}", 48, needed, "GB at most", source, note)

    return [figure("host", paged), figure("device", run)]


def rows() -> list[dict[str, Any]]:
    """Every figure as JSON values, and whether ours agrees with the printed figure."""
    return [{**f._asdict(), "agrees": agrees(f)} for f in figures()]


def agrees(f: Figure) -> bool:
    """Whether ours is within 5 % of the printed figure, or at most a figure that a source calls enough."""
    return f.ours <= f.said if f.unit.endswith("at most") else abs(f.ours / f.said - 1) <= SAME


def text(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    head = ("what", "printed", "ours", "", "source", "")
    lines = [
        (
            r["what"],
            f"{r['said']:g} {r['unit']}",
            f"{r['ours']:.4g}",
            "" if r["agrees"] else "differs",
            r["source"],
            r["note"],
        )
        for r in found
    ]
    return aligned([head, *lines])
