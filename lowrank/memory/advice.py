"""Advice for a run that does not fit: the settings to change, with the memory that each saves, the cheapest first."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, AxisType

from lowrank.core import config_file, sharding
from lowrank.core.errors import UserError
from lowrank.memory import formulas
from lowrank.training.build import build_run
from lowrank.training.run import Run


class Option(NamedTuple):
    """A change of the config and its cost in words."""

    changes: Mapping[str, Any]
    costs: str
    devices: int = 0  # the number of devices if it differs from the run's, else 0


class Advice(NamedTuple):
    """An option and its figures, in bytes on each device."""

    option: Option
    saves: int  # by this option alone
    leaves: int  # the peak with this option alone
    leaves_with_all_before: int  # the peak with this option and the previous ones


def possible_options(run: Run, memory: int) -> Iterator[Option]:
    """The changes that `run` can still make, from those that cost time alone to those that cost quality."""
    c, model = run.config, run.network.config
    if (parts := _microbatches(run, memory)) > run.optim.accumulate:
        yield Option({"optim.accumulate": parts}, "same numbers; smaller products are slower")
    if run.objective.vocabulary_logits and (c.logits_chunk_tokens == 0 or c.logits_chunk_tokens > 128):
        yield Option({"logits_chunk_tokens": 128}, "same numbers; smaller products in the head")
    if model.remat not in ("full", "offload"):
        yield Option({"model.remat": "full"}, "same numbers; about a third more to compute")
    if model.remat != "offload":
        yield Option({"model.remat": "offload"}, "as full, and each block's input is copied to the host and back")
    if not run.optim.paged:
        yield Option({"optim.paged": True}, "same numbers; the optimizer's state is copied from the host and back")
    yield from _meshes(run)
    yield from _dtypes(run)
    if c.method.get("rank", 0) > 1:
        yield Option({"method.rank": c.method["rank"] // 2}, "an adapter that can learn less")
    if not run.model.quantize:
        yield Option({"model.quantize": "int8"}, "kernels in 8 bits: a small loss of quality")
        yield Option({"model.quantize": {"name": "nf4", "double": True}}, "kernels in 4 bits: QLoRA's loss of quality")


def _dtypes(run: Run) -> Iterator[Option]:
    """Narrower dtypes: by `model.precision` where the config sets it, otherwise by the options that it stands for."""
    activations = "activations rounded to 8 bits of mantissa; faster on accelerators"
    weights = "frozen weights rounded to 8 bits of mantissa"
    if run.model.precision:
        if run.model.precision != "bf16":
            yield Option({"model.precision": "bf16"}, f"{weights}; {activations}")
        return
    if run.network.config.dtype == "float32":
        yield Option({"model.dtype": "bfloat16"}, activations)
    if run.model.param_dtype == "float32":
        yield Option({"model.param_dtype": "bfloat16"}, weights)


def _microbatches(run: Run, memory: int) -> int:
    """The smallest number of microbatches whose peak is about `memory`, or one microbatch per row."""
    now, before = formulas.estimate_memory(run), run.optim.accumulate
    rows = _rows(run) // sharding.num_batch_shards(run.mesh)
    fixed = now.resident + now.batch + 2 * now.adapter
    fits = lambda n: fixed + (now.activations + now.temporary) * before / n <= memory  # noqa: E731
    return next((n for n in range(before, rows) if rows % n == 0 and fits(n)), rows)


def _rows(run: Run) -> int:
    return next(iter(formulas.step_inputs(run).batch.values())).shape[0]


def _meshes(run: Run) -> Iterator[Option]:
    """Options that shard the weights over all of the run's devices, then over more devices."""
    size, rows = run.mesh.size, _rows(run)
    for n in (size, *(size * k for k in (2, 4, 8))):
        if n > run.mesh.shape["fsdp"] and rows % n == 0:
            where = {"mesh.data": 1, "mesh.fsdp": n, "mesh.tensor": 1, "optim.accumulate": rows // n}
            where |= {"mesh.context": 1} if run.mesh.shape["context"] > 1 else {}
            yield Option(where, "weights are gathered between devices" if n == size else f"{n} devices", n)


def advise(run: Run, memory: int) -> list[Advice]:
    """The options that save memory, in order, until the peak with all listed options is at most `memory` bytes.

    Options of different kinds add up; of two options that change the same key, the later one replaces the earlier.
    """
    now, together, devices = formulas.estimate_memory(run).peak, dict[str, Any](), 0
    advice: list[Advice] = []
    for option in possible_options(run, memory):
        alone = _peak(run, option.changes, option.devices)
        if alone is None or alone >= now:
            continue
        more = together | dict(option.changes)
        combined = _peak(run, more, option.devices or devices) if together else alone
        if combined is not None and combined < (advice[-1].leaves_with_all_before if advice else now):
            together, devices = more, option.devices or devices
            advice.append(Advice(option, now - alone, alone, combined))
            if combined <= memory:
                break
    return advice


def _peak(run: Run, changes: Mapping[str, Any], devices: int) -> int | None:
    """The peak by formula with these changes; None for a config that is refused."""
    inside = {k: v for k, v in changes.items() if not (devices and k.startswith("mesh."))}
    try:
        varied = build_run(config_file.with_changes(vars(run.config), inside), list(run.mesh.devices.flat), like=run)
    except UserError:
        return None
    if devices:
        varied = dataclasses.replace(varied, mesh=abstract_mesh(fsdp=devices))  # type: ignore[arg-type]
    return formulas.estimate_memory(varied).peak


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh of abstract devices, for the shardings of shapes; an axis without a size has 1 device."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))
