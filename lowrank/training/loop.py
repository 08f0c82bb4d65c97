"""The training loop: load, split, step, score, save, and finish with the adapter and the report."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank import methods
from lowrank.adapters import adapter_files
from lowrank.core import files, multihost, parameter_summary, tree
from lowrank.core.errors import Diverged, UserError
from lowrank.core.paths import AnyPath, PathLike, as_path, exists
from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.core.typing import PyTree
from lowrank.kernels import dispatch
from lowrank.methods.method import MapBatch
from lowrank.pretrained.fingerprint import fingerprint
from lowrank.training import report, start, step, workdir
from lowrank.training.best import Best
from lowrank.training.build import build_run
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.log import LOSS, METRICS, RunLog, read_metrics
from lowrank.training.preemption import StopSignal
from lowrank.training.profile import Profile
from lowrank.training.reference import StoredReference
from lowrank.training.run import Run
from lowrank.training.texts import Texts

SUMMARY, BEFORE, ADAPTER, BEST = "summary.json", "before.json", "adapter", "best"
UNSCORED: dict[str, Any] = {"scores": {}, "texts": []}  # of a model that is not scored
FROZEN = "frozen"  # the root of the frozen leaves in a checkpoint, which calibration or restarts change


def run(
    config: Mapping[str, Any],
    directory: PathLike,
    command: str = "",
    profile: int = 0,
) -> dict[str, Any]:
    """Trains the run of `config` (a ConfigDict or nested dicts) in `directory`; returns the summary that it writes.

    A run with a checkpoint in the directory is continued, bit for bit on the same mesh. At SIGTERM the run saves and
    returns early, with `stopped_at` in the summary.

    Args:
      config: the config of the run.
      directory: the folder of the run, local or `gs://BUCKET/...`.
      command: the shell command that repeats the run, for the report.
      profile: the number of steps that are traced, into the folder `profile`.

    Raises:
      UserError: the config is wrong, or `profile` exceeds the run, which is found before any compute; or the disk
        cannot be written.
      Diverged: a loss or a gradient is not finite.
    """
    held = contextlib.ExitStack()
    with multihost.agreed():
        folder = as_path(directory)
        run = build_run(config)
        workdir.check_config(directory, config)
        hold = held.enter_context(workdir.lock(folder))
    every, keep = run.checkpoint.every, run.checkpoint.keep
    with held, StopSignal() as stop, Checkpointer(folder / "checkpoints", every, keep) as saver:
        done = saver.latest() or 0
        if (summary := _finished_summary(folder, done)) is not None:
            return summary
        run = start.with_merged_base(run, folder)
        traces = Profile(folder, profile, run.config.steps - done)
        settings = {"loggers": run.config.loggers, "config": files.to_json(config)}
        with RunLog(folder, run.config.steps, start=done, tokens_per_step=run.tokens_per_step, **settings) as log:
            log.say(run.table)
            log.say(dispatch.describe(run.mesh.devices.flat[0].device_kind))
            log.say(run.attention)
            log.say(run.loader.describe())
            trainer = Trainer(run, folder, saver, log, stop, hold, command)
            workdir.claim(folder, config)
            return trainer.train(traces)


def _finished_summary(folder: AnyPath, last: int) -> dict[str, Any] | None:
    """The summary of a run that has ended at step `last`, the step of its last checkpoint; None if it has not ended."""
    path = folder / SUMMARY
    summary = files.read_json(path) if last and exists(path) else {}
    if summary.get("steps_done", summary.get("steps")) != last:
        return None
    if jax.process_index() == 0:
        print(f"the run has finished already; report: {folder / 'report.md'}", file=sys.stderr)
    return summary


class Trainer:
    """The training of one run, which starts from its last checkpoint."""

    def __init__(
        self,
        run: Run,
        folder: AnyPath,
        saver: Checkpointer,
        log: RunLog,
        stop: StopSignal,
        hold: Callable[[], None],
        command: str,
    ):
        """Loads the base, attaches the method and restores the last checkpoint, if there is one."""
        self.run, self.folder, self.saver, self.log, self.command = run, folder, saver, log, command
        self.stop, self.hold = stop, hold
        base = run.load()
        run.check_new(base.new)
        self.base = dataclasses.replace(base, params=None)
        self.optimizer = run.optimizer()
        self.state, self.frozen, self.original = run.start(base.params, self.optimizer)
        self.reference, self.texts, params = StoredReference(run), Texts(run), self._params()
        if run.scorer:
            run.scorer.remember(params)
        if saver.latest() is None:
            self.reference.fill(params)
        del params
        self.map_batch: MapBatch = self.reference.join
        if init_map := run.method.hooks.map_batch:
            self.map_batch = init_map(run.network, self.frozen)
            self.run = dataclasses.replace(run, objective=run.objective.on_features or run.objective)
        self.metrics: Mapping[str, jax.Array] | None = None  # of the last finished step
        self.compile_seconds = 0.0
        better = run.objective.score.better
        self.best = Best(run.checkpoint, run.scorer.config.better(better) if run.scorer else better)
        self.scores: dict[int, dict[str, float]] = {}  # step -> scores, of the evaluations in this process
        latest = saver.latest()
        if latest is not None:
            self._restore(latest)

    def train(self, profile: Profile) -> dict[str, Any]:
        """Trains the run and writes the adapter and the report; returns the summary, as `run` describes."""
        first = self._scores_before()
        with profile:
            done = self._train_steps(profile)
        if done < self.run.config.steps and not self.best.exhausted:
            self.log.say(f"stopped after step {done}; the same command continues")
            return {"stopped_at": done}
        if self.best.config.best:
            self._return_to_best(done)
        return self._finish(first, self._evaluate(), done)

    def _restore(self, last: int) -> None:
        arrays, meta = self.saver.restore(last, self._like())
        start.check_digest(self.run, meta.get("adapter", ""), self.folder)
        self._place(arrays)
        self.run.loader.set_state(meta["host"])
        self.best.restore(meta["best"])
        self.log.say(f"continuing after step {last}")

    def _like(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = self._arrays()
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays.items()}

    def _place(self, arrays: dict[str, jax.Array]) -> None:
        """Replaces the state, the reference and the changing frozen leaves by the arrays of a checkpoint."""
        arrays = self.texts.restore(self.reference.restore(arrays))
        frozen = {name: arrays.pop(f"{FROZEN}/{name}") for name in self.run.changing}
        self.state = unflatten_named(self.state, arrays)
        self.frozen = tree.map_named(lambda name, x: frozen.get(name, x), self.frozen)

    def _train_steps(self, profile: Profile) -> int:
        """Trains until the last step, SIGTERM or the end of `patience`, and saves; returns the number of steps done."""
        c, start, program = self.run.config, int(self.state.step), None
        done = start
        while done < c.steps and not self.best.exhausted and not self.stop.requested(done):
            self.hold()
            if self.run.restarts_at(done):
                self._restart(done)
            batch = self._batch(done, saves=done > start)
            program = program or self._compile(batch)
            previous = self.metrics
            with profile.before(done, previous):
                self.state, self.metrics = program(self.state, self.frozen, batch, self.run.learning_rates[done])
            self._check_finite(done, previous)  # one step behind, so that the device does not wait for the host
            done += 1
            if done % c.log_every == 0 or done == c.steps:
                self.log.scalars(done, {f"train/{name}": value for name, value in self.metrics.items()})
            if self.run.scorer and self.run.scorer.due(done) and done < c.steps:
                self._note_best(done, self._score(done))
            if self.saver.due(done):
                self._save(done)
        if done > start:
            self._save(done, block=True)
        return done

    def _restart(self, done: int) -> None:
        trained, self.frozen = tree.split(self.run.restart(self._params(), done), self.run.mask)
        self.state = dataclasses.replace(self.state, trained=trained)

    def _batch(self, done: int, saves: bool) -> dict[str, jax.Array]:
        """The next batch. Where it cannot be read or judged, what is done is saved first if it `saves`."""
        try:
            batch = self.texts.batch(self.map_batch, self._params, done)
        except UserError:
            if saves:
                self._save(done, block=True)
            raise
        for line in self.run.loader.notes():
            self.log.say(line)
        if batch is None:
            raise UserError(f"the data ended after step {done} of {self.run.config.steps}: raise data.epochs")
        return self.run.put(batch)

    def _compile(self, batch: Mapping[str, jax.Array]) -> jax.stages.Compiled:
        started = time.monotonic()
        program = step.compile_step(self.run.step(self.optimizer), self.state, self.frozen, batch)
        self.compile_seconds = time.monotonic() - started
        return program

    def _check_finite(self, done: int, metrics: Mapping[str, jax.Array] | None) -> None:
        for name in ("loss", "grad_norm") if metrics else ():
            assert metrics is not None
            if not math.isfinite(value := float(metrics[name])):
                self.saver.wait()
                last = self.saver.latest()
                survivor = "the run has no checkpoint" if last is None else f"the checkpoint of step {last} is intact"
                raise Diverged(f"{name} is {value} at step {done}; {survivor}: lower optim.lr")

    def _save(self, done: int, block: bool = False) -> None:
        self._check_finite(done, self.metrics)
        self.hold()
        self.log.flush()  # a run that resumes from the checkpoint finds the lines before it
        self.saver.save(done, self._arrays(), self._meta(done), block=block, host=self.run.loader.get_state())

    def _meta(self, done: int) -> dict[str, Any]:
        facts = {"step": done, "config": files.to_json(vars(self.run.config)), "adapter": start.digest(self.run)}
        return facts | {"best": self.best.to_meta()}

    def _note_best(self, done: int, scores: Mapping[str, float]) -> None:
        """Saves step `done` beside the newest checkpoints if its scores are the best so far."""
        if self.best.update(done, scores):
            with self._best_saver() as saver:
                saver.save(done, self._arrays(), self._meta(done), block=True, host=self.run.loader.get_state())

    def _best_saver(self) -> Checkpointer:
        return Checkpointer(self.folder / BEST, keep=2)  # two, as a killed run repeats steps before the last best step

    def _return_to_best(self, done: int) -> None:
        """Replaces the leaves of step `done` by those of the best step; the scores of step `done` count as well."""
        if done == self.run.config.steps:
            self._note_best(done, self._score(done))
        if self.best.step is None or self.best.step == done:
            return
        with self._best_saver() as saver:
            arrays, _ = saver.restore(self.best.step, self._like())
        self._place(arrays)
        self.log.say(f"the adapter is that of step {self.best.step}: {self.best.config.best} {self.best.score:.4g}")

    def _arrays(self) -> dict[str, jax.Array]:
        changing = {n: x for n, x in tree.named_leaves(self.frozen) if n in self.run.changing}
        frozen = {f"{FROZEN}/{name}": x for name, x in changing.items()}
        return flatten_named(self.state) | frozen | self.reference.arrays() | self.texts.arrays()

    def _params(self) -> PyTree:
        return tree.join(self.state.trained, self.frozen)

    def _score(self, done: int) -> dict[str, float]:
        """The scores of the parameters of step `done`, which are computed and logged only once."""
        if done not in self.scores:
            assert self.run.scorer is not None
            with self.log.paused():
                self.scores[done] = scores = self.run.scorer.scores(self._params())
            self.log.scalars(done, {report.logged_name(name): value for name, value in scores.items()})
        return self.scores[done]

    def _evaluate(self) -> dict[str, Any]:
        """`{scores, texts}` of the current parameters; both are empty without an `eval` group."""
        if not self.run.scorer:
            return UNSCORED
        scores = self._score(int(self.state.step))
        with self.log.paused():
            more, texts = self.run.scorer.texts(self._params())
        return {"scores": scores | more, "texts": texts}

    def _scores_before(self) -> dict[str, Any]:
        """The scores and texts before the first step, read from the file if the run is resumed."""
        path = self.folder / BEFORE
        if self.run.scorer and not self.run.scorer.config.before:
            return UNSCORED
        if int(self.state.step) == 0 or not exists(path):
            files.write_json(path, self._evaluate())
        return files.read_json(path)

    def _finish(self, before: Mapping[str, Any], after: Mapping[str, Any], done: int) -> dict[str, Any]:
        c, texts = self.run.config, (before["texts"], after["texts"])
        saved = tree.map_named(lambda name, learns: learns or name in self.run.changing, self.run.mask)
        params, mask = methods.exported_leaves(self.run.method, own := self._params(), saved)
        kind = adapter_files.save(
            params,
            self.base,
            self.folder / ADAPTER,
            mask=mask,
            method=files.to_json(c.method),
            original=self.original,
            base_hash=fingerprint(self.run.model.name),
            exact=(own, saved),
        )
        summary = {
            "model": self.run.model.name,
            "method": c.method["name"],
            "steps": c.steps,
            "steps_done": done,
            **self._best_facts(),
            "final_loss": self._final_loss(),
            **parameter_summary.count_parameters(self.run.shapes, self.run.mask),
            **report.peak_memory(),
            "seconds": self.log.seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_s": self.log.tokens_per_s,
            "before": before["scores"],
            "after": after["scores"],
            "samples": self.run.scorer.samples(*texts) if self.run.scorer and all(texts) else [],
        }
        if jax.process_index() == 0:
            self._report(summary, kind)
        self.log.say(f"{kind}: {self.folder / ADAPTER}; report: {self.folder / 'report.md'}")
        return summary

    def _best_facts(self) -> dict[str, Any]:
        if self.best.step is None:
            return {}
        return {"best_step": self.best.step, f"best_{self.best.config.best}": self.best.score}

    def _final_loss(self) -> float | None:
        """The loss of the last step, read from the log if the step was done before a resume."""
        if self.metrics:
            return float(self.metrics["loss"])
        path = self.folder / METRICS
        logged = [line[LOSS] for line in read_metrics(path) if LOSS in line] if exists(path) else []
        return logged[-1] if logged else None

    def _report(self, summary: dict[str, Any], kind: str) -> None:
        self.log.flush()  # the report lists the sizes of the log's files
        report.write(
            self.folder,
            summary,
            self.run.table,
            title=f"{summary['method']} on {summary['model']}",
            command=self.command,
            config=files.to_json(vars(self.run.config)),
            samples=summary["samples"],
            files={ADAPTER: kind, "checkpoints": "trained leaves, optimizer, data position"},
        )
        files.write_json(self.folder / SUMMARY, summary)
