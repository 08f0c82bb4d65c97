import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import os

from tests.cases import common

root = common.folder()
base, adapter, wrong = common.llama(root / "base"), common.adapter(root / "adapter", common.on_queries()), []
from lowrank.core import files

for mask in (0o022, 0o002, 0o077):
    os.umask(mask)
    out = root / f"merged-{mask:03o}"
    common.command("launch.merge", f"--adapter={adapter}", f"--base={base}", f"--output={out}", check=True)
    files.write_text(root / f"run-{mask:03o}" / "report.md", "text")
    for path in (out, *out.iterdir(), root / f"run-{mask:03o}" / "report.md"):
        mode, want = path.stat().st_mode & 0o777, (0o777 if path.is_dir() else 0o666) & ~mask
        if mode != want:
            wrong.append(f"umask {mask:03o}: {path.relative_to(root)} is {mode:03o}, not {want:03o}")
common.verdict(not wrong, "; ".join(wrong) or "every mode follows the umask")
