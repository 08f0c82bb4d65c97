import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import os

from tests.cases import common

root = common.folder()
home, here = root / "home", root / "here"
home.mkdir()
here.mkdir()
common.llama(home / "base")
common.jsonl(home / "a.jsonl", [{"prompt": "one", "completion": " two"}] * 8)
run = lambda data, work: common.command(
    "launch.main",
    *(
        f"--config={common.tiny_config()}",
        f"--workdir={work}",
        "--config.model.name=~/base",
        f"--config.data.source=jsonl:{data}",
    ),
    cwd=here,
    env={**os.environ, "HOME": str(home)},
)
data = run("~/a.jsonl", root / "run")
print("data.source=jsonl:~/a.jsonl:", data.stderr.strip().splitlines()[-1])
work = run(home / "a.jsonl", "~/run")
print("workdir=~/run:", work.stderr.strip().splitlines()[-1], "| beside the command:", [p.name for p in here.iterdir()])
common.verdict(
    data.returncode == 0 and (home / "run").is_dir() and not (here / "~").exists(), "~ is the home folder in every path"
)
