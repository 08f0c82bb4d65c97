import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenizers import AddedToken, Tokenizer

from lowrank import pretrained
from tests.cases import common

base = common.llama(common.folder() / "base")
tok = Tokenizer.from_file(str(base / "tokenizer.json"))
tok.add_special_tokens([AddedToken("<image>", special=True)])  # its id is the model's vocabulary size: it has no row
tok.save(str(base / "tokenizer.json"))
model, said = common.attempt(lambda: pretrained.load(str(base)))
common.verdict(model is not None, said or "read; only a text that holds the token would be an error")
