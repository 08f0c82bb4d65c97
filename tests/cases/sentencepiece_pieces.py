import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.cases import common

INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
LINES = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def sentencepiece(where: Path, template: str, prepend: bool) -> Path:
    words = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "\n", "▁", "▁▁", "hi", "▁hi", "he", "▁he"]
    vocab = {w: i for i, w in enumerate(words)}
    merges = [("h", "i"), ("▁", "hi"), ("h", "e"), ("▁", "he"), ("▁", "▁")]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    if prepend:  # the older form
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    where.mkdir(parents=True)
    tok.save(str(where / "tokenizer.json"))
    about = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (where / "tokenizer_config.json").write_text(json.dumps(about))
    return where


root, ok = common.folder(), True
chat = [
    {"role": r, "content": c}
    for r, c in (("user", "hello"), ("assistant", "hi"), ("user", "hello"), ("assistant", "hi"))
]
for form in (True, False):
    for name, template in (("[INST]", INST), ("lines", LINES)):
        tok = common.read_tokenizer(sentencepiece(root / f"{form}{name}", template, form))
        ids = common.encoded(common.jsonl(root / "a.jsonl", [{"messages": chat}]), tok)[0][0]
        whole = tok.encode(tok.chat(chat))
        show = lambda x: " ".join(tok.backend.id_to_token(i) for i in x).replace("\n", "\\n")
        print(f"{name}, {'prepend' if form else 'metaspace'}: {'alike' if ids == whole else ''}")
        if ids != whole:
            print(f"  trained on  {show(ids)}\n  as one text {show(whole)}")
        ok &= ids == whole
common.verdict(ok, "the tokens of a conversation are those of its text")
