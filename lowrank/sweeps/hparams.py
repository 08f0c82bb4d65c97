"""A study in TensorBoard's HParams tab: a session per cell, and a group per point, with means over the seeds.

`tensorboard --logdir=FOLDER/hparams` shows it. The files are written anew each time, under the same names.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.core.files import write_bytes
from lowrank.core.paths import AnyPath
from lowrank.sweeps import claims
from lowrank.sweeps.cells import spell
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.training.loggers.tensorboard import hidden

FOLDER, FILE = "hparams", "events.out.tfevents.0"
PLUGIN, PREFIX = "hparams", "_hparams_/"  # of the tags that TensorBoard looks for
ENDS = {
    claims.DONE: "STATUS_SUCCESS",
    **dict.fromkeys((claims.FAILED, claims.DIVERGED, claims.REFUSED), "STATUS_FAILURE"),
}
MEASURED = ("trained_params", "seconds")  # of a summary, shown beside the study's metric


def write_hparams(study: StudyFolder, results: Sequence[Result], folder: AnyPath | None = None) -> AnyPath:
    """Writes the sessions of the cells that were started to `hparams/KEY` in `folder`, by default the study's.

    Returns the folder `hparams`.
    """
    protos, folder = _Protos(), (folder or study.path) / FOLDER
    axes: dict[str, list[Any]] = {}
    for result in results:
        for key, value in result.group.items():
            axes.setdefault(key, []).append(value)
    numeric = {key for key, values in axes.items() if all(map(_is_number, values))}
    infos = [_axis_info(protos, key, axes[key], key in numeric) for key in axes]
    names = [protos.api.MetricName(tag=tag) for tag in dict.fromkeys((study.metric, *MEASURED))]
    tags = [protos.api.MetricInfo(name=name) for name in names]
    experiment = protos.api.Experiment(description=study.name, hparam_infos=infos, metric_infos=tags)
    protos.write(folder / FILE, [protos.tagged("experiment", experiment=experiment)])
    for result in results:
        if result.state != claims.WAITING:
            protos.write(folder / result.cell.key / FILE, _session(protos, study, result, numeric))
    return folder


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _axis_info(protos: "_Protos", key: str, values: Sequence[Any], numeric: bool) -> Any:
    """An axis with its range, or with its values."""
    api = protos.api
    if numeric:
        interval = api.Interval(min_value=min(values), max_value=max(values))
        return api.HParamInfo(name=key, type=api.DATA_TYPE_FLOAT64, domain_interval=interval)
    info = api.HParamInfo(name=key, type=api.DATA_TYPE_STRING)
    info.domain_discrete.extend(dict.fromkeys(map(spell, values)))
    return info


def _session(protos: "_Protos", study: StudyFolder, result: Result, numeric: set[str]) -> list[Any]:
    """The events of a cell: its values of the axes, its scores, and how it has ended."""
    start = protos.plugin.SessionStartInfo(group_name=spell(result.group) or study.name)
    for key, value in result.group.items():
        if key in numeric:
            start.hparams[key].number_value = value
        else:
            start.hparams[key].string_value = spell(value)
    scores = {study.metric: result.score} | {name: result.summary.get(name, math.nan) for name in MEASURED}
    events = [protos.tagged("session_start_info", session_start_info=start)]
    events += [protos.summary.scalar(name, value) for name, value in scores.items() if math.isfinite(value)]
    if result.state in ENDS:
        end = protos.plugin.SessionEndInfo(status=protos.api.Status.Value(ENDS[result.state]))
        events.append(protos.tagged("session_end_info", session_end_info=end))
    return events


class _Protos:
    """TensorBoard's messages, as tensorboardX has them."""

    def __init__(self) -> None:
        with hidden("torch"):
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import api_pb2, event_pb2, plugin_hparams_pb2, summary_pb2
        self.api, self.plugin, self.summary = api_pb2, plugin_hparams_pb2, summary
        self._event, self._summary, self._writer = event_pb2.Event, summary_pb2, event_file_writer.EventsWriter

    def tagged(self, tag: str, **content: Any) -> Any:
        """A summary whose metadata are `content`, which is how the tab's data are kept."""
        data = self.plugin.HParamsPluginData(version=0, **content).SerializeToString()
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name=PLUGIN, content=data)
        )
        return self._summary.Summary(value=[self._summary.Summary.Value(tag=PREFIX + tag, metadata=metadata)])

    def write(self, path: AnyPath, summaries: Sequence[Any]) -> None:
        """Writes a file of these summaries."""
        with tempfile.TemporaryDirectory(prefix="lowrank-") as local:
            writer = self._writer(f"{local}/events")
            for summary in summaries:
                writer.write_event(self._event(wall_time=time.time(), summary=summary))
            writer.close()
            [file] = Path(local).iterdir()
            write_bytes(path, file.read_bytes())
