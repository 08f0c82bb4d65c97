"""A run's report in a browser: its tables are tables, and its picture is there."""

import markdown
import pytest

from configs import tiny as tiny_config
from lowrank.training import loop
from tests.support.browser import serve


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    config, workdir = tiny_config.get_config("rank=2"), tmp_path_factory.mktemp("run")
    config.model.name, config.data.source = str(files / "llama"), f"jsonl:{files / 'records.jsonl'}"
    config.steps, config.mesh = 2, {"data": 1}
    config.eval.update({"split": "train", "max_examples": 4})
    loop.run(config, workdir)
    return workdir


def test_a_report_renders_with_its_tables_and_its_picture(workdir, browser):
    body = markdown.markdown((workdir / "report.md").read_text(), extensions=["tables"])
    (workdir / "report.html").write_text(f"<!doctype html><link rel=icon href=data:,>{body}")
    with serve(workdir) as address:
        assert browser.open(f"{address}/report.html") == []
    assert browser.run("return document.querySelectorAll('table tr').length") > 2
    assert browser.run("return [...document.images].map(image => image.naturalWidth)")[0] > 100
