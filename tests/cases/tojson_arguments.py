import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

ok, root = True, common.folder()
for i, arguments in enumerate(("ensure_ascii=False", "separators=(',', ':')", "sort_keys=True", "indent=2")):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.about | tojson(ARGUMENTS) }}<|im_end|>\n{% endfor %}".replace(
        "ARGUMENTS", arguments
    )
    tok = common.read_tokenizer(common.tokenizer(root / f"t{i}", template))
    chat = [{"role": "user", "content": "one", "about": {"city": "Århus"}}]
    found, said = common.attempt(lambda t=tok, c=chat: t.chat(c))
    print(f"tojson({arguments}): {said or repr(found)}")
    ok &= found is not None and "Århus" in found
common.verdict(
    ok, "the filter's arguments are those that transformers has, and nothing in a template ends in a stack trace"
)
