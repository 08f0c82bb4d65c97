import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root, ok = common.folder(), True
base = common.llama(root / "base")
short, long = {"prompt": "one", "completion": " two"}, {"prompt": "one", "completion": " two" * 60}
turns = [
    t
    for i in range(30)
    for t in ({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"})
]
chat = {"messages": turns[:2]}
sets = {
    "20 records, one too long": [short] * 10 + [long] + [short] * 9,
    "20 conversations, one too long": [chat] * 10 + [{"messages": turns}] + [chat] * 9,
    "20050 records, one too long": [short] * 15000 + [long] + [short] * 5049,
}
for i, (name, records) in enumerate(sets.items()):
    path = common.jsonl(root / f"{i}.jsonl", records)
    args = [
        f"--config={common.tiny_config()}",
        f"--workdir={root / str(i)}",
        f"--config.model.name={base}",
        f"--config.data.source=jsonl:{path}",
    ]
    args += [
        "--config.data.seq_len=128",
        "--config.steps=300" if i == 2 else "--config.steps=4",
        "--config.log_every=50",
        "--config.data.batch_size=8",
    ]
    done = common.command("launch.main", *args)
    trained = "step 50/" in done.stderr or "step 1/" in done.stderr
    print(
        f"{name}: exit code {done.returncode}{', after training had begun' if trained and done.returncode else ''}: {done.stderr.strip().splitlines()[-1]}"
    )
    ok &= done.returncode == 0 or not trained
common.verdict(ok, "whatever a record that is too long becomes, a run does not die of it after training has begun")
