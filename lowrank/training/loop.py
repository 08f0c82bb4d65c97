"""The training run: plan, load, split, step, save. Everything else lives in the file that its name says."""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank import methods
from lowrank.adapters import adapter_files
from lowrank.core import files, parameter_summary, sharding, tree
from lowrank.core.errors import Diverged, UserError
from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.core.typing import PyTree
from lowrank.training import build, report, step, workdir
from lowrank.training import run as plan
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.log import LOSS, METRICS, RunLog, read_metrics
from lowrank.training.preemption import StopSignal

SUMMARY, BEFORE, ADAPTER = "summary.json", "before.json", "adapter"
UNKNOWN: dict[str, Any] = {"scores": {}, "texts": []}  # of a model that is not scored
FROZEN = "frozen"  # the root of the frozen leaves in a checkpoint: those that a method's restarts change


def run(
    config: Mapping[str, Any],
    directory: str | os.PathLike[str],
    command: str = "",
    before: bool = True,
    after: bool = True,
) -> dict[str, Any]:
    """Fine-tunes as `config` (a ConfigDict or nested dicts) says, in `directory`; returns the summary it leaves there.

    A directory with a checkpoint of the same config is continued, bit for bit on the same mesh. SIGTERM saves and
    returns early, with `stopped_at` in the summary. `command` is what the report says to repeat the run with.
    `before`, `after`: the model is scored before the first step and after the last one.

    Raises:
      UserError: a bad config, before anything is computed; a disk that refuses.
      Diverged: a loss that is not finite.
    """
    job = build.build_run(config)
    folder = Path(directory)
    workdir.check_config(folder, config)
    every, keep = job.checkpoint.every, job.checkpoint.keep
    with workdir.lock(folder), StopSignal() as stop, Checkpointer(folder / "checkpoints", every, keep) as saver:
        start = saver.latest() or 0
        if start == job.config.steps and (folder / SUMMARY).exists():
            if jax.process_index() == 0:
                print(f"finished already; report: {folder / 'report.md'}", file=sys.stderr)
            return json.loads((folder / SUMMARY).read_text())
        with RunLog(folder, job.config.steps, start=start, tokens_per_step=job.tokens_per_step) as log:
            log.say(job.table)
            ready = Trainer(job, folder, saver, log, stop, command)
            workdir.claim(folder, config)
            return ready.go(before, after)


class Trainer:
    """One run of a plan, from its last checkpoint on."""

    def __init__(self, job: plan.Run, folder: Path, saver: Checkpointer, log: RunLog, stop: StopSignal, command: str):
        """Loads the base, attaches the method and restores what a checkpoint holds."""
        self.job, self.folder, self.saver, self.log, self.stop, self.command = job, folder, saver, log, stop, command
        base = job.load()
        _check_new(base.new, job.frozen, job.method)
        self.base = dataclasses.replace(base, params=None)
        self.optimizer = job.optimizer()
        self.state, self.frozen, self.original = job.start(base.params, self.optimizer)
        init_map = job.method.hooks.map_batch
        self.map_batch = init_map(job.network, self.frozen) if init_map else lambda batch: batch
        self.metrics: Mapping[str, jax.Array] | None = None  # of the last step done
        self.compile_seconds = 0.0
        if saver.latest() is not None:
            self._restore(saver.latest())

    def go(self, before: bool = True, after: bool = True) -> dict[str, Any]:
        """Trains, and leaves the adapter and the report, scored as asked; or stops where SIGTERM came."""
        found = self._before() if before else UNKNOWN
        done = self._train()
        if done < self.job.config.steps:
            self.log.say(f"stopped after step {done}; the same command continues")
            return {"stopped_at": done}
        return self._finish(found, self._judge() if after else UNKNOWN)

    def _restore(self, last: int) -> None:
        like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in self._arrays().items()}
        arrays, meta = self.saver.restore(last, like)
        frozen = {name: arrays.pop(f"{FROZEN}/{name}") for name in self.job.changing}
        self.state = unflatten_named(self.state, arrays)
        self.frozen = tree.map_named(lambda name, x: frozen.get(name, x), self.frozen)
        self.job.loader.set_state(meta["host"])
        self.log.say(f"continuing after step {last}")

    def _train(self) -> int:
        """Trains to the end or to SIGTERM and saves; returns the number of steps done."""
        c, start, program = self.job.config, int(self.state.step), None
        done = start
        while done < c.steps and not self.stop.requested(done):
            if self.job.restarts_at(done):
                self._restart(done)
            batch = self._batch(done)
            program = program or self._compile(batch)
            previous = self.metrics
            self.state, self.metrics = program(self.state, self.frozen, batch, self.job.rates[done])
            self._check_finite(done, previous)  # one step behind, so that the device does not wait for the host
            done += 1
            if done % c.log_every == 0 or done == c.steps:
                self.log.scalars(done, {f"train/{name}": value for name, value in self.metrics.items()})
            if self.saver.due(done):
                self._save(done)
            if self.job.scorer and self.job.scorer.due(done) and done < c.steps:
                self._score(done)
        if done > start:
            self._save(done, block=True)
        return done

    def _restart(self, done: int) -> None:
        trained, self.frozen = tree.split(self.job.restart(self._params(), done), self.job.mask)
        self.state = dataclasses.replace(self.state, trained=trained)

    def _batch(self, done: int) -> dict[str, jax.Array]:
        batch = next(self.job.loader, None)
        if batch is None:
            raise UserError(f"the data ended after step {done} of {self.job.config.steps}: raise data.epochs")
        return sharding.global_batch(self.map_batch(batch), self.job.mesh)

    def _compile(self, batch: Mapping[str, jax.Array]) -> jax.stages.Compiled:
        started = time.monotonic()
        program = step.compile_step(self.job.step(self.optimizer), self.state, self.frozen, batch)
        self.compile_seconds = time.monotonic() - started
        return program

    def _check_finite(self, done: int, metrics: Mapping[str, jax.Array] | None) -> None:
        for name in ("loss", "grad_norm") if metrics else ():
            if not math.isfinite(value := float(metrics[name])):
                self.saver.wait()
                kept = self.saver.latest()
                survivor = "there is no checkpoint" if kept is None else f"the checkpoint of step {kept} is intact"
                raise Diverged(f"{name} is {value} at step {done}; {survivor}")

    def _save(self, done: int, block: bool = False) -> None:
        self._check_finite(done, self.metrics)
        meta = {"step": done, "config": files.to_json(vars(self.job.config))}
        self.saver.save(done, self._arrays(), meta, block=block, host=self.job.loader.get_state())

    def _arrays(self) -> dict[str, jax.Array]:
        changing = {n: x for n, x in tree.named_leaves(self.frozen) if n in self.job.changing}
        return flatten_named(self.state) | {f"{FROZEN}/{name}": x for name, x in changing.items()}

    def _params(self) -> PyTree:
        return tree.join(self.state.trained, self.frozen)

    def _score(self, done: int) -> dict[str, float]:
        with self.log.paused():
            scores = self.job.scorer.scores(self._params())
        self.log.scalars(done, {f"eval/{'loss' if name == 'nll' else name}": v for name, v in scores.items()})
        return scores

    def _judge(self) -> dict[str, Any]:
        """`{scores, texts}` of the parameters as they are; nothing without an `eval` group."""
        if not self.job.scorer:
            return UNKNOWN
        scores = self._score(int(self.state.step))
        with self.log.paused():
            more, texts = self.job.scorer.texts(self._params())
        return {"scores": scores | more, "texts": texts}

    def _before(self) -> dict[str, Any]:
        """The scores before the first step, from the file if the run goes on after a stop."""
        path = self.folder / BEFORE
        if int(self.state.step) == 0 or not path.exists():
            files.write_json(path, self._judge())
        return json.loads(path.read_text())

    def _finish(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        c, texts = self.job.config, (before["texts"], after["texts"])
        saved = tree.map_named(lambda name, learns: learns or name in self.job.changing, self.job.mask)
        params, mask = methods.exported_leaves(self.job.method, self._params(), saved)
        kind = adapter_files.save(
            params,
            self.base,
            self.folder / ADAPTER,
            mask=mask,
            method=files.to_json(c.method),
            original=self.original,
        )
        summary = {
            "model": self.job.model.name,
            "method": c.method["name"],
            "steps": c.steps,
            "final_loss": self._final_loss(),
            **parameter_summary.totals(self.job.shapes, self.job.mask),
            **report.peak_memory(),
            "seconds": self.log.seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_s": self.log.tokens_per_s,
            "before": before["scores"],
            "after": after["scores"],
            "samples": self.job.scorer.samples(*texts) if all(texts) else [],
        }
        if jax.process_index() == 0:
            self._report(summary, kind)
        self.log.say(f"{kind}: {self.folder / ADAPTER}; report: {self.folder / 'report.md'}")
        return summary

    def _final_loss(self) -> float | None:
        """The loss of the last step, which may have been done, and logged, before a restart."""
        if self.metrics:
            return float(self.metrics["loss"])
        path = self.folder / METRICS
        logged = [line[LOSS] for line in read_metrics(path) if LOSS in line] if path.exists() else []
        return logged[-1] if logged else None

    def _report(self, summary: dict[str, Any], kind: str) -> None:
        self.log.flush()  # the report says how large its files are
        report.write(
            self.folder,
            summary,
            self.job.table,
            title=f"{summary['method']} on {summary['model']}",
            command=self.command,
            config=files.to_json(vars(self.job.config)),
            samples=summary["samples"],
            files={ADAPTER: kind, "checkpoints": "trained leaves, optimizer, data position"},
        )
        files.write_json(self.folder / SUMMARY, summary)


def _check_new(new: Sequence[str], frozen: Collection[str], method: methods.Method) -> None:
    """Raises UserError for a leaf that no checkpoint holds and nothing trains: it would stay as it was drawn."""
    made = {n for p in method.export.frozen for n in new if re.fullmatch(p, n)}
    for name in sorted((set(new) - made) & set(frozen)):
        raise UserError(f"{name} is in no checkpoint and the method does not train it: it would stay random")
