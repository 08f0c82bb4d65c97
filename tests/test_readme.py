"""README.md, CONTRIBUTING.md and docs/: tables are those of result files, names exist, and the loop trains."""

import dataclasses
import inspect
import re

import pytest

from experiments import tables
from lowrank import data, models
from lowrank.core import sharding
from lowrank.evaluation.evaluator import EvalConfig
from lowrank.training.config import CheckpointConfig, ModelConfig
from lowrank.training.optimizer import OptimConfig

ROOT = tables.ROOT
README = (ROOT / "README.md").read_text()
PAGES = (*tables.PAGES, ROOT / "CONTRIBUTING.md")
GROUPS = {  # the keys of a config's groups
    "model": (ModelConfig, models.DecoderConfig, models.EncoderConfig),
    "data": (data.DataConfig,),
    "optim": (OptimConfig,),
    "eval": (EvalConfig,),
    "checkpoint": (CheckpointConfig,),
}
KEYS = {name: {f.name for cls in classes for f in dataclasses.fields(cls)} for name, classes in GROUPS.items()}
KEYS |= {"mesh": set(inspect.signature(sharding.make_mesh).parameters)}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def test_every_table_is_shown():
    marked = {name for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", page.read_text())}
    assert marked == set(tables.TABLES)


@each_page
def test_every_table_is_what_its_result_file_says(page):
    assert tables.with_tables(page.read_text()) == page.read_text()


@each_page
def test_no_figure_stands_in_a_table_that_no_file_fills(page):
    text = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", page.read_text(), flags=re.DOTALL)
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.fullmatch(r"[\d.,]+ ?%?", cell)]


@each_page
def test_every_command_and_file_that_is_named_exists(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= set(targets)
    for module in re.findall(r"python -m ((?:launch|experiments|lowrank)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    shown = re.findall(r'title="([\w/.]+)', text)  # what CONTRIBUTING.md tells to write
    for name in re.findall(r"\b((?:configs|lowrank|tests|experiments|launch|docs)/[\w/]*(?:\.\w+)?)", text):
        assert name in shown or (ROOT / name).exists(), name


@each_page
def test_every_key_of_a_config_that_is_named_exists(page):
    text = re.sub(r"```python.*?```", "", page.read_text(), flags=re.DOTALL)
    for group, key in re.findall(rf"(?<![\w.])(?:--config\.)?({'|'.join(KEYS)})\.(\w+)(?![\w(])", text):
        assert key in KEYS[group], f"{group}.{key}"


@each_page
def test_every_flag_of_a_command_that_is_shown_exists(page):
    sources = "".join(path.read_text() for path in [*ROOT.glob("launch/**/*.py"), *ROOT.glob("experiments/**/*.py")])
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^python -m (?:launch|experiments).*", text, flags=re.MULTILINE):
        for flag in re.findall(r" --(\w+)(?![\w.])", line):
            assert f'"{flag}"' in sources or f'"--{flag}"' in sources, f"--{flag} in {line}"


def test_the_readme_is_one_page_whose_links_lead_somewhere():
    assert len(README.encode()) <= 8000
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def run_code(page: str, replaced: dict[str, str]) -> None:
    """Runs the Python of a page, its names of models and data replaced by tiny ones."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    for shown, used in replaced.items():
        assert shown in code
        code = code.replace(shown, used)
    exec(compile(code, page, "exec"), {})


def test_the_loop_trains_and_saves_an_adapter_that_the_guides_read(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {'"smollm2-135m"': repr(str(files / "llama"))}
    records = f"{f'jsonl:{files}/records.jsonl'!r}, seq_len=32"
    run_code("README.md", model | {'"bbc_news", template="headline", seq_len=128': records})
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    here = {'"runs/headlines/adapter")': '"adapter", "smollm2-135m")', '"runs/headlines/adapter"': '"adapter"'}
    run_code("docs/guides/adapters.md", here | model)  # a folder's name alone does not say where it is
    assert "(3, 16, 8)" in capsys.readouterr().out
    run_code("docs/guides/models.md", model | {"The weather in London": "the cat"})
    assert "['" in capsys.readouterr().out


@pytest.mark.parametrize("room", sorted(path.parent.name for path in ROOT.glob("lowrank/*/__init__.py")))
def test_every_room_has_a_sentence_and_a_page(room):
    assert f"| `lowrank/{room}/` |" in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"::: lowrank.{room}\n" in (ROOT / "docs" / "api" / f"{room}.md").read_text()
    assert f"api/{room}.md" in (ROOT / "mkdocs.yml").read_text()
