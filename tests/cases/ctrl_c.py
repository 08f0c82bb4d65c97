import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import signal
import subprocess

from tests.cases import common

root = common.folder()
base = common.llama(root / "base")
path = common.jsonl(root / "a.jsonl", [{"prompt": "one", "completion": " two"}] * 40)
args = [
    f"--config={common.tiny_config()}",
    f"--workdir={root / 'run'}",
    f"--config.model.name={base}",
    f"--config.data.source=jsonl:{path}",
]
args += ["--config.steps=100000", "--config.checkpoint.every=50000", "--config.log_every=10"]
run = subprocess.Popen(
    [sys.executable, "-m", "launch.main", *args], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
)
said = []
for line in run.stderr:
    said.append(line.rstrip())
    if "step 10/" in line:
        run.send_signal(signal.SIGINT)
run.wait()
kept = sorted(p.name for p in (root / "run" / "checkpoints").glob("[0-9]*"))
traced = any("Traceback" in line for line in said)
common.verdict(bool(kept) and not traced, f"exit code {run.returncode}, checkpoints {kept}, last line: {said[-1]}")
