import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lowrank import pretrained
from lowrank.adapters import peft
from lowrank.data.sources import open_source
from tests.cases import common

root, bad = common.folder(), []
deep = '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"


def base(name: str) -> Path:
    where = common.llama(root / name.partition(".")[0])
    (where / name).write_text(deep)
    return where


def adapter() -> None:
    where = common.adapter(root / "adapter", common.on_queries())
    (where / "adapter_config.json").write_text(deep)
    peft.describe_adapter(where)


def record(text: str) -> None:
    (root / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + text + "\n")
    open_source(f"jsonl:{root}/a.jsonl", "train", root)


tries = {
    "config.json": (lambda: pretrained.load(str(base("config.json"))), "config.json"),
    "tokenizer_config.json": (lambda: pretrained.load(str(base("tokenizer_config.json"))), "tokenizer_config.json"),
    "adapter_config.json": (adapter, "adapter_config.json"),
    "a deep record": (lambda: record(deep), "a.jsonl:2"),
    "a long integer": (lambda: record('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}"), "a.jsonl:2"),
}
for name, (make, where) in tries.items():
    said = common.attempt(make)[1]
    print(f"{name}: {said[:150]}")
    if not (said.startswith("error: ") and where in said):
        bad.append(name)
common.verdict(not bad, f"no line that names file and place for {', '.join(bad)}" if bad else "each is one line")
