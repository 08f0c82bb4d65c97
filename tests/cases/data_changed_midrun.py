import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json
import os
import subprocess

from tests.cases import common

root = common.folder()
base = common.llama(root / "base")
lines = lambda answer, more="": [{"prompt": f"p{i:05d}{more * (i % 7)}", "completion": answer} for i in range(20_050)]


def losses(name: str, other: list | None) -> tuple[list, int, str, bool]:
    path, work = common.jsonl(root / f"{name}.jsonl", lines(" aaaa")), root / name
    args = [
        f"--config={common.tiny_config()}",
        f"--workdir={work}",
        f"--config.model.name={base}",
        f"--config.data.source=jsonl:{path}",
    ]
    args += [
        "--config.steps=400",
        "--config.log_every=10",
        "--config.checkpoint.every=0",
        "--config.data.packing=false",
        "--config.data.prefetch=1",
    ]
    run = subprocess.Popen([sys.executable, "-m", "launch.main", *args], stderr=subprocess.PIPE, text=True)
    log = work / "metrics.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        pass
    if other:
        os.replace(common.jsonl(root / f"{name}.new", other), path)
    said = run.communicate()[1].strip().splitlines()[-1]
    kept = any((work / "checkpoints").glob("[0-9]*"))
    return (
        [x["train/loss"] for x in map(json.loads, log.read_text().splitlines()) if "train/loss" in x],
        run.returncode,
        said,
        kept,
    )


plain, verdicts = losses("plain", None)[0], []
for name, other in {"same-lengths": lines(" zzzz"), "other-lengths": lines(" zzzz", "x")}.items():
    found, code, said, kept = losses(name, other)
    ok = (code == 0 and found == plain) or (code == 2 and "changed" in said and kept)
    verdicts.append(ok)
    print(
        f"{name}: exit code {code}, {len(found)} losses, those of the file it checked: {found == plain[: len(found)]}, checkpoint: {kept}, said: {said[:160]}"
    )
common.verdict(all(verdicts), "a file that changes during a run is noticed, or does no harm")
