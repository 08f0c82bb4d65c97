import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

root, bad = common.folder(), []
for i, about in enumerate(
    (
        {"eos_token": ["a"]},
        {"bos_token": 5},
        {"chat_template": 5},
        {"chat_template": {"a": 1}},
        {"chat_template": [{"template": "x"}]},
    )
):
    (key,) = about
    where = (
        common.tokenizer(root / str(i), **about)
        if key != "chat_template"
        else common.tokenizer(root / str(i), template=about[key])
    )
    said = common.attempt(lambda where=where: common.read_tokenizer(where).chat([{"role": "user", "content": "hi"}]))[1]
    print(f"{about}: {said[:120] or 'no error'}")
    if not (said.startswith("error: ") and key in said):
        bad.append(str(about))
common.verdict(not bad, f"no line for {', '.join(bad)}" if bad else "each is one line that names the key")
