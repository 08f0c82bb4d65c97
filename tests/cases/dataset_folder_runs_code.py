import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json
import os

from tests.cases import common

root = common.folder()
base, data = common.llama(root / "base"), root / "downloads" / "evil"
data.mkdir(parents=True)
split = {
    "name": "train",
    "shardLengths": ["1"],
    "numBytes": "1",
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
}
about = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
(data / "dataset_info.json").write_text(json.dumps(about))
(data / "features.json").write_text(
    json.dumps({"pythonClassName": "downloads.evil.payload.Feature", "jsonFeature": {"json": "{}"}})
)
(data / "payload.py").write_text(f"open({str(root / 'ran')!r}, 'w').close()\n")
(root / "empty").mkdir()
project = Path(common.tiny_config()).parents[1]
said = []
for folder in ("downloads/evil", "empty"):
    args = [
        f"--config={common.tiny_config()}",
        f"--workdir={root / 'run'}",
        f"--config.model.name={base}",
        f"--config.data.source=tfds:{folder}",
    ]
    done = common.command("launch.main", *args, cwd=root, env={**os.environ, "PYTHONPATH": str(project)})
    said.append(f"tfds:{folder}: exit code {done.returncode}{', stack trace' if 'Traceback' in done.stderr else ''}")
ran = (root / "ran").exists()
common.verdict(
    not ran and not any("trace" in s for s in said),
    f"code of the data folder {'ran' if ran else 'did not run'}; {'; '.join(said)}",
)
