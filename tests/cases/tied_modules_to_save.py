import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root = common.folder()
base = common.llama(root / "base", tied=True)
rows = common.load_file(base / "model.safetensors")["model.embed_tokens.weight"]
table, head = f"{common.PRE}model.embed_tokens.weight", f"{common.PRE}lm_head.weight"
plain = common.with_adapter(base, common.adapter(root / "q", common.on_queries()))
cases = {
    "both, alike": ({table: 1.5 * rows, head: 1.5 * rows}, ["embed_tokens", "lm_head"]),
    "both, apart": ({table: 1.5 * rows, head: 0.5 * rows}, ["embed_tokens", "lm_head"]),
    "the head alone": ({head: 0.5 * rows}, ["lm_head"]),
}
ok = True
for i, (name, (whole, listed)) in enumerate(cases.items()):
    make = lambda i=i, w=whole, m=listed: common.with_adapter(
        base, common.adapter(root / f"a{i}", common.on_queries() | w, modules_to_save=m)
    )
    found, said = common.attempt(make)
    print(f"{name}: {said or f'logits moved by {abs(found - plain).max():.3g}'}")
    ok &= found is not None and abs(found - plain).max() > 0.1
common.verdict(ok, "saved embeddings on a base whose head shares them")
