import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root = common.folder()
base = common.llama(root / "base")
tensors = common.load_file(base / "model.safetensors")
whole = {f"{common.PRE}{n}": tensors[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
alone = common.with_adapter(base, common.adapter(root / "q", common.on_queries()))
same, said = common.attempt(lambda: common.with_adapter(base, common.adapter(root / "a", common.on_queries() | whole)))
print("the base's own embedding and head come along:", said or f"differs by {abs(same - alone).max():.3g}")
changed = common.on_queries() | {k: 1.5 * x for k, x in whole.items()}
moved, more = common.attempt(lambda: common.with_adapter(base, common.adapter(root / "b", changed)))
print("trained ones come along:", more or f"differs by {abs(moved - alone).max():.3g}")
ok = same is not None and abs(same - alone).max() < 1e-5 and moved is not None and abs(moved - alone).max() > 0.1
common.verdict(ok, "whole embeddings in the file, which modules_to_save does not list")
