import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fcntl
import os
import socket
import subprocess
import time

from tests.cases import common

root = common.folder()
base = common.llama(root / "base")
path = common.jsonl(root / "a.jsonl", [{"prompt": "one", "completion": " two"}] * 40)
(root / "run").mkdir()
held = open(root / "run" / ".lock", "a")
fcntl.flock(held, fcntl.LOCK_EX)
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]


def start(rank: int) -> subprocess.Popen:
    args = [
        f"--config={common.tiny_config()}",
        f"--workdir={root / 'run'}",
        f"--config.model.name={base}",
        f"--config.data.source=jsonl:{path}",
    ]
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(rank), "LOCALID": str(rank)}
    env = {**os.environ, **{f"SLURM_{k}": v for k, v in slurm.items()}, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    args += ["--config.distributed=true", "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.main", *args],
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


processes, said, right = [start(0), start(1)], [[], []], []
for line in processes[0].stderr:
    said[0].append(line.rstrip())
    if "in use" in line:
        refused = time.monotonic()
said[1] = processes[1].stderr.read().strip().splitlines()
for process in processes:
    process.stderr.close()
held.close()
codes, late = [p.wait() for p in processes], time.monotonic() - refused
for i, lines in enumerate(said):
    right.append(codes[i] == 2 and any("in use" in x for x in lines) and not any("Traceback" in x for x in lines))
    print(
        f"process {i}: exit code {codes[i]}, {len(lines)} lines, last error: {[x for x in lines if 'rror' in x][-1][:160]}"
    )
common.verdict(all(right) and late < 10, f"both have ended {late:.0f} s after the first refused")
