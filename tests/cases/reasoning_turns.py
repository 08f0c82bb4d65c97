import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

template = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
root = common.folder()
tok = common.read_tokenizer(common.tokenizer(root / "tok", template))
turns = [t for i in range(5) for t in ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"})]
found, said = common.attempt(lambda: common.encoded(common.jsonl(root / "a.jsonl", [{"messages": turns}]), tok))
learned = common.text(tok, found[0][1]) if found else ""
print("learned:", said or repr(learned))
common.verdict(
    all(f"a{i}" in learned for i in range(5)),
    f"{sum(f'a{i}' in learned for i in range(5))} of 5 answers are learned, and nothing says so",
)
