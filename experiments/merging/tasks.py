"""The tasks of the study, each a prompt and its completion, and the text on which none of the models is trained.

Three tasks are made of BBC News; the fourth writes the first line of a docstring of Python's standard library, whose
modules are split by their name. What is read elsewhere is the prose of Python's language reference.
"""

import ast
import json
import pydoc_data.topics
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank import data
from lowrank.core.files import scratch_beside
from lowrank.data.config import DataConfig

FOLDER = Path("runs/merging/texts")
LIBRARY, REFERENCE, ELSEWHERE = FOLDER / "library", FOLDER / "reference", "elsewhere"
SPLITS = ("train",) * 6 + ("validation", "test")  # of a module, by a hash of its name
TASKS: Mapping[str, Mapping[str, Any]] = {
    "headline": {"source": "bbc_news", "template": "headline"},
    "section": {"source": "bbc_news", "template": "News: {title}\nSection:", "completion": " {label}"},
    "record": {
        "source": "bbc_news",
        "template": "News: {title}\nJSON:",
        "completion": ' {{"section": "{label}", "headline": "{title}"}}',
        "truncate": "title",
    },
    "docstring": {"source": f"jsonl:{LIBRARY}", "template": "{code}\n", "completion": '    """{summary}"""'},
}
TEXTS = {**TASKS, ELSEWHERE: {"source": f"jsonl:{REFERENCE}", "template": "text", "split": "test"}}


def loader(name: str, tokenizer: Any, *, split: str, length: int, batch_size: int, seed: int | None, rows: int) -> Any:
    """The batches of a task: shuffled by a seed and without an end, or one pass over `rows` rows in order."""
    once = {"shuffle": False, "epochs": 1, "max_examples": rows} if seed is None else {"seed": seed}
    fixed = {"packing": False, "prompt_loss_weight": 0.0, "prefetch": 0, "seq_len": length, "batch_size": batch_size}
    fixed["too_long"] = "drop" if "truncate" not in TEXTS[name] and name != "headline" else "cut"
    return data.make_loader(DataConfig(**{"split": split, **TEXTS[name], **fixed, **once}), tokenizer)


def write_texts() -> None:
    """Writes the records of the standard library, and those of the language reference, if they are missing."""
    if not LIBRARY.exists():
        _write(LIBRARY, docstrings(Path(sysconfig.get_paths()["stdlib"])))
    if not REFERENCE.exists():
        _write(REFERENCE, (("test", {"text": text}) for text in paragraphs(pydoc_data.topics.topics)))


def docstrings(library: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`(split, {code, summary})` of every public function with a docstring, each summary once."""
    seen = set()
    for path in sorted(library.glob("*.py")):
        split = SPLITS[zlib.crc32(path.stem.encode()) % len(SPLITS)]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if 20 <= len(summary) <= 80 and '"' not in summary and summary not in seen:
                    seen.add(summary)
                    yield (
                        split,
                        {"code": f"def {node.name}({', '.join(a.arg for a in node.args.args)}):"}
                        | {"summary": summary},
                    )


def paragraphs(topics: Mapping[str, str]) -> Iterator[str]:
    """Paragraphs of prose, as one line each."""
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if 150 <= len(text) <= 400 and text[0].isupper() and text.endswith("."):
                yield text


def _write(folder: Path, records: Iterator[tuple[str, Mapping[str, str]]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(folder, folder=True) as scratch:
        lines: dict[str, list[str]] = {}
        for split, record in records:
            lines.setdefault(split, []).append(json.dumps(record) + "\n")
        for split, of in lines.items():
            (scratch / f"{split}.jsonl").write_text("".join(of), encoding="utf-8")
        scratch.rename(folder)
