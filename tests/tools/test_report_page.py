"""A run's report in a browser: its tables are tables, and its picture is there."""

import markdown
import pytest

from configs import tiny as tiny_config
from lowrank.training import loop
from tests.support.browser import open_page, served

WIDTHS = "<script>onload = () => document.title = [...document.images].map(x => x.naturalWidth).join()</script>"


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    config, workdir = tiny_config.get_config("rank=2"), tmp_path_factory.mktemp("run")
    config.model.name, config.data.source = str(files / "llama"), f"jsonl:{files / 'records.jsonl'}"
    config.steps, config.mesh = 2, {"data": 1}
    config.eval.update({"split": "train", "max_examples": 4})
    loop.run(config, workdir)
    return workdir


def test_a_report_renders_with_its_tables_and_its_picture(workdir):
    body = markdown.markdown((workdir / "report.md").read_text(), extensions=["tables"])
    (workdir / "report.html").write_text(f"<!doctype html><link rel=icon href=data:,>{body}{WIDTHS}")
    with served(workdir) as address:
        html, console = open_page(f"{address}/report.html")
    assert console == []
    assert "<table>" in html
    [width] = html.partition("<title>")[2].partition("</title>")[0].split(",")
    assert int(width) > 100
