import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json

from lowrank import pretrained
from tests.cases import common

base = common.llama(common.folder() / "base", pad_token_id=-1)
about = json.loads((base / "tokenizer_config.json").read_text())
del about["pad_token"]
(base / "tokenizer_config.json").write_text(json.dumps(about))
model, said = common.attempt(lambda: pretrained.load(str(base)))
common.verdict(model is not None, said or f"-1 means none: padding is {model.tokenizer.pad_id}")
