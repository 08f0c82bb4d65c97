import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
root = common.folder()
tok = common.read_tokenizer(common.tokenizer(root / "tok", template))
chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
found, said = common.attempt(lambda: common.encoded(common.jsonl(root / "a.jsonl", [{"messages": chat}]), tok))
common.verdict(
    bool(found) and common.text(tok, found[0][1]).startswith("two<|im_end|>"), said or common.text(tok, found[0][0])
)
