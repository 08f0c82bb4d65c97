"""Stages of one run, such as continued pre-training, supervised tuning and preferences: one command, one folder.

Each stage is a run in a folder of its own, and starts from the adapter of the stage before: it trains it further
(`start="carry"`), or merges it into the base and begins a method anew (`start="merge"`).
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core import config_file, multihost
from lowrank.core.errors import UserError, unknown
from lowrank.core.files import read_json
from lowrank.core.paths import AnyPath, PathLike, as_path, exists
from lowrank.methods.agreement import agreed_group
from lowrank.training import loop, stage_report, workdir
from lowrank.training.build import build_run
from lowrank.training.config import CARRY, MERGE, STARTS, RunConfig
from lowrank.training.run import Run
from lowrank.training.start import MERGED_BASE, check_continues, check_mergeable

STAGES = "stages"
OWN = ("name", "start")  # keys of a stage beside those of a config
KEYS = (*OWN, *(f.name for f in dataclasses.fields(RunConfig) if f.name != "distributed"))
NAMED = ("method", "objective")  # groups that another name replaces, as the options of one mean nothing to another
OF_THE_BASE = ("name", "adapter", "start", "quantize", "upcycle")  # keys of `model` that all stages share


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: its name, its folder, how it starts, and its config without the adapter that it starts from."""

    name: str
    folder: AnyPath
    start: str
    config: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether its run has ended."""
        return exists(self.folder / loop.SUMMARY)

    @property
    def adapter(self) -> str:
        """The folder of its adapter."""
        return str(self.folder / loop.ADAPTER)


def read_stages(config: Mapping[str, Any], directory: PathLike) -> list[Stage]:
    """The stages of a config, each in its folder of `directory`, `1_NAME`, `2_NAME` and so on.

    A stage's keys are laid over those of the config: the keys of a group over the group's, and a `method` or an
    `objective` of another name in its place. Raises UserError for a key that no stage has, with the nearest one.
    """
    rest = config_file.with_changes({key: value for key, value in config.items() if key != STAGES}, {})
    groups = config[STAGES]
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise UserError(f"{STAGES} must be a list of groups, one for each stage, not {groups!r}")
    stages = [_stage(rest, group, i, as_path(directory)) for i, group in enumerate(groups)]
    for i, stage in enumerate(stages):
        if stage.name in [other.name for other in stages[:i]]:
            raise UserError(f"{STAGES}[{i}].name={stage.name} names two stages: give each a name of its own")
    return stages


def recorded(directory: PathLike) -> list[Stage]:
    """The stages of the run in a folder; none where it is not the folder of a run in stages."""
    path = as_path(directory) / workdir.CONFIG
    config = read_json(path) if exists(path) else {}
    return read_stages(config, directory) if STAGES in config else []


def _stage(rest: Mapping[str, Any], group: Any, i: int, directory: AnyPath) -> Stage:
    where = f"{STAGES}[{i}]"
    if not hasattr(group, "items"):
        raise UserError(f"{where} must be a group of keys over those of the config, not {group!r}")
    group = config_file.with_changes(group, {})
    for key in group:
        if key not in KEYS:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in KEYS])
    for key in OF_THE_BASE if isinstance(group.get("model"), Mapping) else ():
        if key in group["model"]:
            raise UserError(f"{where}.model.{key} is that of all stages: set model.{key}, and {where}.start")
    name, start = group.pop("name", ""), group.pop("start", CARRY)
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"{where}.name={name!r} must be a word of letters, digits, - and _: it names the folder")
    if start not in STARTS:
        raise unknown(f"{where}.start", str(start), STARTS)
    if not i and start != CARRY:
        raise UserError(f"{where}.start={start} has no stage before it: set model.adapter and model.start")
    return Stage(name, directory / f"{i + 1}_{name}", start, _laid_over(rest, group))


def _laid_over(rest: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(rest)
    for key, value in group.items():
        old = config.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            renamed = key in NAMED and value.get("name", old.get("name")) != old.get("name")
            value = value if renamed else {**old, **value}
        config[key] = value
    return config


def run(config: Mapping[str, Any], directory: PathLike, command: str = "", profile: int = 0) -> dict[str, Any]:
    """Runs the stages of `config` in `directory`, and continues them where they were stopped; returns the summary.

    The arguments are those of `loop.run`. All stages are checked before the first step of the first one. Raises
    UserError naming the stage whose config is wrong, and for a `profile`, which traces one run.
    """
    if profile:
        raise UserError("--profile traces one run, and the config has stages: trace one by its own config")
    folder, held = as_path(directory), contextlib.ExitStack()
    with multihost.agreed():
        stages = read_stages(config, folder)
        workdir.check_config(folder, config)
        check_stages(stages)
        held.enter_context(workdir.lock(folder))
    with held:
        workdir.claim(folder, config)
        for started, stage in zip(_started(stages), stages, strict=True):
            with _named(stage):
                summary = read_json(stage.folder / loop.SUMMARY) if stage.done else None
                summary = summary or loop.run(started, stage.folder, command)
            if "stopped_at" in summary:
                return {**summary, "stage": stage.name}
        return stage_report.write(folder, stages, command)


def _started(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The configs of the stages, each with the adapter and the base of the stage before."""
    configs, base = list[dict[str, Any]](), stages[0].config.get("model", {}).get("name")
    for i, stage in enumerate(stages):
        changes = {"model.adapter": stages[i - 1].adapter, "model.start": stage.start, "model.name": base} if i else {}
        configs.append(config_file.with_changes(stage.config, changes))
        if configs[-1].get("model", {}).get("start") == MERGE:
            base = str(stage.folder / MERGED_BASE)
    return configs


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises UserError, naming the stage, for one whose run is wrong, or does not fit the stage before.

    A stage that has ended is compared with its folder's config alone.
    """
    before: Run | None = None
    for i, (started, stage) in enumerate(zip(_started(stages), stages, strict=True)):
        with _named(stage):
            workdir.check_config(stage.folder, started)
            if stage.done:
                continue
            if i == 0 or stages[i - 1].done:
                before = build_run(started)
            else:
                assert before is not None
                before = _check_after(before, stage, stages[i - 1])


def _check_after(before: Run, stage: Stage, last: Stage) -> Run:
    """The run of a stage without the adapter of the stage before, which is still to be trained by the run `before`."""
    config, where = config_file.with_changes(stage.config, {"model.adapter": "", "model.start": CARRY}), last.name
    if stage.start == MERGE:
        check_mergeable(before, f"stage {where}")
        return build_run(config)
    config["method"] = agreed_group(config.get("method", {}), before.config.method, f"the adapter of stage {where}")
    run = build_run(config)
    check_continues(run, before, f"the adapter of stage {where}")
    return run


@contextlib.contextmanager
def _named(stage: Stage) -> Any:
    """Errors of the stage name it."""
    try:
        yield
    except UserError as e:
        raise type(e)(f"stage {stage.name}: {e}") from e
