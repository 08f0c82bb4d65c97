import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import contextlib
import io

import huggingface_hub

from lowrank.adapters import load
from tests.cases import common

root, asked = common.folder(), []
base = common.llama(root / "base")


def snapshot(repo: str, **how) -> str:
    asked.append((repo, how.get("revision")))
    return str(base)


huggingface_hub.snapshot_download = snapshot
heard = io.StringIO()
with contextlib.redirect_stderr(heard):
    where = common.adapter(root / "a", common.on_queries(), base_model_name_or_path="org/name", revision="abc123")
    common.attempt(lambda: load.load_adapted(where))
print("asked of the hub:", asked, "| said:", heard.getvalue().strip() or "nothing")
bad = []
for i, name in enumerate((5, ["a"], {"a": 1})):
    where = common.adapter(root / f"b{i}", common.on_queries(), base_model_name_or_path=name)
    said = common.attempt(lambda where=where: load.load_adapted(where))[1]
    print(f"{name!r}: {said[:120]}")
    bad += [] if said.startswith("error: ") else [repr(name)]
common.verdict(
    asked[:1] == [("org/name", "abc123")] and "org/name" in heard.getvalue() and not bad,
    "the revision, a word before fetching, and one line for a name that is no text",
)
