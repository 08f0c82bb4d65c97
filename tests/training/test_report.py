"""The report holds what a reader needs to judge and repeat the run."""

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

from lowrank.training import report
from lowrank.training.log import RunLog
from tests.support.close import assert_close

ROOT = Path(__file__).parents[2]


def logged(workdir, losses, evaluations=()):
    with RunLog(workdir, 100, stream=io.StringIO()) as log:
        for step, loss in enumerate(losses):
            log.scalars(step, {"train/loss": loss})
        for step, loss in evaluations:
            log.scalars(step, {"eval/loss": loss})


def axes_of(train, **held_out):
    axes = Figure().add_subplot()
    series = {name: np.array(points, float).reshape(-1, 2) for name, points in held_out.items()}
    report._draw(axes, np.array(train, float).reshape(-1, 2), series)
    return axes


def test_the_report_names_everything_the_reader_asks_for(tmp_path):
    logged(tmp_path, [3.0, 2.0, 1.0])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"x" * 2000)
    path = report.write(
        tmp_path,
        {"before": {"rougeL": 0.1}, "after": {"rougeL": 0.25, "loss": 1.5}, "seconds": 75.0, "tokens_per_s": 1234.5,
         "peak_host_bytes": 2_500_000_000, "trained_percent": 0.3412, "total_params": 134515008, "stopped": "no"},
        "rule  makes\nq|v   LoRA",
        title="Headlines",
        command="python -m launch.main --config=x",
        config={"optim": {"lr": 1e-3}},
        samples=[{"article": "has ``` ticks", "after": "A | headline"}],
        files={"adapter": "the adapter", "absent": "never made"},
    )  # fmt: skip
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert text.startswith("# Headlines\n\n```sh\npython -m launch.main --config=x\n```\n")
    assert "| rougeL | 0.1 | 0.25 | +0.15 |" in text
    assert "| loss |  | 1.5 |  |" in text
    assert "| seconds | 75.0 s (01:15) |" in text
    assert "| tokens_per_s | 1234.5 |" in text
    assert "| peak_host_bytes | 2.50GB |" in text
    assert "| trained_percent | 0.3412 % |" in text
    assert "| total_params | 134,515,008 |" in text
    assert "```\nrule  makes\nq|v   LoRA\n```" in text
    assert "````\nhas ``` ticks\n````" in text
    assert "| `adapter` | 2.00kB | the adapter |" in text
    assert "absent" not in text
    assert '"lr": 0.001' in text
    assert "![Loss by step](loss.png)" in text
    assert (tmp_path / "loss.png").exists()


def test_a_report_without_losses_has_no_plot(tmp_path):
    logged(tmp_path, [math.nan])
    text = report.write(tmp_path, {"seconds": 1.0}).read_text()
    assert "loss.png" not in text
    assert not (tmp_path / "loss.png").exists()
    assert not re.search(r"## \S.*\n+(?=##|$)", text)  # no empty section


def test_the_plot_is_a_picture_of_the_logged_losses(tmp_path):
    logged(tmp_path, np.linspace(3, 1, 60), [(0, 3.2), (59, 1.1)])
    pixels = imread(report.plot_losses(tmp_path))
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert pixels.std() > 0.05


def test_the_curves_are_labelled_and_the_smoothing_is_stated():
    train = [(step, 1.0) for step in range(100)]
    axes = axes_of(train, **{"eval/loss": [(0, 2.0), (99, 1.0)], "eval/old/loss": [(0, 3.0)]})
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "loss")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["train", "train, mean of 5 logged values", "evaluation", "old"]
    assert [t.get_text() for t in axes_of(train[:10]).get_legend().get_texts()] == ["train"]


def test_smoothing_is_the_mean_of_the_window_so_far():
    values = np.array([4.0, 2.0, 6.0, 1.0])
    expected = [np.mean(values[max(0, i - 1) : i + 1]) for i in range(4)]
    assert_close(report.trailing_mean(values, 2), expected, relative=1e-12)
    np.testing.assert_array_equal(report.trailing_mean(values, 1), values)


MEMORY = """
import numpy as np
from lowrank.training.report import peak_memory
before = peak_memory()["peak_host_bytes"]
block = np.ones(25_000_000)
del block
print(before, peak_memory()["peak_host_bytes"])
"""


def test_peak_memory_remembers_what_was_freed():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert 150e6 < after - before < 250e6
