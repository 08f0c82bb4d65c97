import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root = common.folder()
base = common.llama(root / "base", tied=True)
head = common.lora("lm_head", common.WIDTH, common.VOCAB)
embedding = common.load_file(base / "model.safetensors")["model.embed_tokens.weight"]
files = {
    "plain": common.on_queries() | head,
    "with the base's weight": common.on_queries() | head | {f"{common.PRE}lm_head.base_layer.weight": embedding},
}
wanted = {"target_modules": ["q_proj", "lm_head"]}
queries = common.with_adapter(base, common.adapter(root / "q", common.on_queries()))
a, b = (head[f"{common.PRE}lm_head.lora_{x}.weight"] for x in "AB")
ok = True
for i, (name, tensors) in enumerate(files.items()):
    found, said = common.attempt(
        lambda i=i, t=tensors: common.with_adapter(base, common.adapter(root / f"a{i}", t, **wanted))
    )
    print(f"{name}: {said or f'logits moved by {abs(found - queries).max():.3g}'}")
    ok &= found is not None and abs(found - queries).max() > 0.1
common.verdict(ok, "the head alone is adapted; the embedding that it shares stays")
