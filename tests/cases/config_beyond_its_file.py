import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import subprocess
import time

from tests.cases import common

CODE = """import resource, sys
sys.path.insert(0, {cases!r})
from tests.cases import common
from lowrank import pretrained
import jax; jax.devices()
used = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
print(common.attempt(lambda: pretrained.load({base!r}))[1])"""
root, bad = common.folder(), []
for key, value in {
    "vocab_size": 10**12,
    "hidden_size": 2**40,
    "head_dim": 2**33,
    "num_hidden_layers": 3_000_000,
}.items():
    base, started = common.llama(root / key, **{key: value}), time.monotonic()
    code = CODE.format(cases=str(Path(__file__).resolve().parents[2]), base=str(base))
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        said = done.stdout.strip() or done.stderr.strip()[-120:]
    except subprocess.TimeoutExpired:
        said = "nothing after 30 s"
    seconds = time.monotonic() - started
    print(f"{key}={value}: {seconds:.1f} s, {said[:160]}")
    if not said.startswith("error: ") or seconds > 10:
        bad.append(key)
common.verdict(not bad, f"no single line in time for {', '.join(bad)}" if bad else "each is one line")
