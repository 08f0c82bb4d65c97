"""Start values for fine-tuning a model on records: `python -m launch.advise --model=NAME --data=SOURCE [options]`.

    --model=NAME         a name, a folder, a .gguf file or a hub id, as in `model.name`
    --data=SOURCE        bbc_news, jsonl:FILE or tfds:NAME, as in `data.source`
    --device=h100[:8]    the devices of the run; by default, those of this machine
    --config.a.b=c       changes of configs/llama_sft_jsonl.py, such as --config.data.template=headline

It prints each value with its source, the changes that make a step fit the devices by formula, the models to try from
the cheapest on, and the command of the run. Nothing is trained, and no weights are read. Bad input is one line on
stderr and exit code 2; the exit code is 1 where no change makes the run fit.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from launch import command, preflight
from lowrank.core import config_file, config_schema, parameter_summary
from lowrank.core.errors import UserError
from lowrank.data import DataConfig, PlannedLoader
from lowrank.memory import advice, devices, formulas
from lowrank.memory.report import format_bytes
from lowrank.training import build
from lowrank.training.run import Run
from lowrank.training.start_values import Facts, StartValue, start_values

CONFIG = "configs/llama_sft_jsonl.py"
BASES = Path(__file__).parents[1] / "experiments" / "bench" / "bases"  # configs of models, without weights
LADDER = ("smollm2-135m", "gemma-3-1b", "llama-3.1-8b", "llama-3.1-70b")  # from the cheapest
FORMATS = {"LoRA": None, "QLoRA": "nf4"}  # `model.quantize`


def main(argv: Sequence[str]) -> int:
    """Prints the advice; returns the exit code."""
    try:
        args, changes = _parse(argv)
        target = devices.parse_device(args.device) if args.device else devices.local_target(jax.devices())
        config = preflight.load_config(CONFIG, [f"--config.model.name={args.model}", *changes])
        config.data.source = args.data
        text, fits = advise(config, target, changes)
    except UserError as e:
        return command.print_error(e)
    print(text)
    return 0 if fits else 1


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`(options, [--config.a.b=c, ...])`. Raises UserError for an unknown flag and for a missing one."""
    parser = command.Parser("python -m launch.advise", __doc__)
    for flag in ("--model", "--data", "--device"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args, changes = parser.parse_with_changes(argv)
    if not args.model or not args.data:
        raise UserError("--model=NAME and --data=SOURCE are both required")
    return args, changes


def advise(config: Any, target: devices.Target, given: Sequence[str] = ()) -> tuple[str, bool]:
    """`(text, whether a run fits the target)`; `given` are the changes of the config that the command repeats."""
    sized = planned(config, {"method.rank": 1}, 1)
    facts = measure(sized)
    values = [v for v in start_values(facts) if not any(word.startswith(f"--config.{v.key}=") for word in given)]
    changes = {v.key: v.value for v in values}
    run = planned(config, changes, target.num_devices, sized)
    peak = formulas.estimate_memory(run).peak
    options = advice.advise(run, target.memory) if peak > target.memory else []
    fits = (options[-1].leaves_with_all_before if options else peak) <= target.memory
    for each in options:
        changes |= each.option.changes
    named = {"model.name": config.model.name, "data.source": config.data.source}
    words = ["python", "-m", "launch.main", f"--config={CONFIG}", "--workdir=runs/advised"]
    words += [f"--config.{k}={v}" for k, v in named.items()]
    words += [*given, *(f"--config.{k}={v}" for k, v in changes.items())]
    lines = [_data_line(facts), "", *_table(values), "", *_memory(peak, options, fits, target), "", "models to try:"]
    lines += [*_ladder(config, changes, target), "", *(["then:", shlex.join(words)] if fits else [])]
    return "\n".join(lines).rstrip(), fits


def measure(run: Run) -> Facts:
    """The sizes of a run's model and of its data; `run` trains a LoRA of rank 1."""
    if run.tokenizer is None:
        raise UserError(f"{run.model.name} has no tokenizer, so the lengths of the records are not known")
    sizes, stats = parameter_summary.count_parameters(run.shapes, run.mask), run.loader.stats
    per_rank, count, learned = int(sizes["trained_params"]), stats["measured"], stats.get("learned", 0)
    settings = config_schema.call_with_group(DataConfig, run.config.data, "data")
    packed = run.objective.row_format.packs(settings)
    rows = stats["tokens"] / settings.seq_len if packed else stats["sequences"]
    rows = math.ceil(rows * stats["examples"] / count)
    lengths = ((stats["tokens"] - learned) / count, learned / count)
    return Facts(int(sizes["total_params"]) - per_rank, per_rank, stats["examples"], rows, *lengths)


def planned(config: Any, changes: Mapping[str, Any], size: int, like: Run | None = None) -> Run:
    """The run with these changes; `size` devices share its rows and its weights as far as they divide the rows.

    `like` is a run on the same data, which are not read again.
    """
    changed = config_file.with_changes(config, {**changes, "mesh": {"data": 1}})
    if like:
        settings = config_schema.call_with_group(DataConfig, {**changed["data"], "labels": like.loader.labels}, "data")
        shapes_alone = PlannedLoader(settings, like.objective.row_format, like.network.config.max_length)
        like = dataclasses.replace(like, loader=shapes_alone)  # type: ignore[arg-type]
    run = build.build_run(changed, jax.devices()[:1], like, planned=True)
    rows = run.loader.shapes["tokens"][0][0]
    return run if size == 1 else dataclasses.replace(run, mesh=advice.abstract_mesh(fsdp=math.gcd(rows, size)))


def _data_line(facts: Facts) -> str:
    lengths = f"{facts.prompt_tokens:.0f} tokens to read and {facts.completion_tokens:.0f} to learn"
    return f"{facts.parameters:,} parameters; {facts.examples:,} examples of about {lengths}"


def _table(values: Sequence[StartValue]) -> list[str]:
    width = max((len(f"{v.key}={v.value}") for v in values), default=0)
    return [f"{f'{v.key}={v.value}':{width}}  {v.why}" for v in values]


def _memory(peak: int, options: Sequence[advice.Advice], fits: bool, target: devices.Target) -> list[str]:
    room = f"{target.num_devices} x {target.name} ({format_bytes(target.memory)} each)"
    if not options:
        return [f"by formula a step takes {format_bytes(peak)}, and {'fits' if fits else 'does not fit'} {room}"]
    flags = [f"  {k}={v}: {o.option.costs}" for o in options for k, v in o.option.changes.items()]
    left = f"{format_bytes(options[-1].leaves_with_all_before)}, which {'fits' if fits else 'does not fit'} {room}"
    return [f"by formula a step takes {format_bytes(peak)}; with the following, {left}:", *flags]


def _ladder(config: Any, changes: Mapping[str, Any], target: devices.Target) -> list[str]:
    """The models from the cheapest on, each with the memory of a step with these values."""
    lines = ["  1. the model at hand without training, with a prompt of a few examples: it costs no step"]
    for i, name in enumerate(LADDER):
        cells = []
        for label, scheme in FORMATS.items():
            path = {"model.name": str(BASES / name), "model.quantize": scheme, "data.source": "bbc_news"}
            peak = formulas.estimate_memory(planned(config, {**changes, **path}, target.num_devices)).peak
            cells.append(f"{label} {format_bytes(peak)}, {'fits' if peak <= target.memory else 'does not fit'}")
        lines.append(f"  {i + 2}. {name}: {'; '.join(cells)}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
