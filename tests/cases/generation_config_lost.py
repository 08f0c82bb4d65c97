import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json

from lowrank import pretrained
from tests.cases import common

root = common.folder()
base = common.llama(root / "base", eos_token_id=258)
(base / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257], "temperature": 0.6, "top_p": 0.9}))
adapter = common.adapter(root / "adapter", common.on_queries(), base_model_name_or_path="base")
done = common.command("launch.merge", f"--adapter={adapter}", f"--base={base}", f"--output={root / 'merged'}")
before, after = (pretrained.load(str(root / n)).tokenizer.stop_ids for n in ("base", "merged"))
print(done.stdout.strip(), done.stderr.strip()[-200:])
print("files:", sorted(p.name for p in (root / "merged").iterdir()))
common.verdict(before == after, f"generation ends at {before} before the merge, and at {after} after it")
