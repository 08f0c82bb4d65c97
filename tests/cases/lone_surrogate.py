import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root = common.folder()
base = common.llama(root / "base")
lines = ['{"prompt": "one", "completion": " two"}'] * 4 + ['{"prompt": "cut emoji \\ud83d", "completion": " two"}']
(root / "a.jsonl").write_text("\n".join(lines) + "\n")
args = (
    f"--config={common.tiny_config()}",
    f"--workdir={root / 'run'}",
    f"--config.model.name={base}",
    f"--config.data.source=jsonl:{root / 'a.jsonl'}",
)
done = common.command("launch.main", *args)
last = done.stderr.strip().splitlines()[-1]
one_line = done.returncode == 2 and "Traceback" not in done.stderr and "a.jsonl:5" in last
common.verdict(done.returncode == 0 or one_line, f"exit code {done.returncode}: {last}")
