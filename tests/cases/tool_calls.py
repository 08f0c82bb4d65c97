import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cases import common

template = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
root = common.folder()
tok = common.read_tokenizer(common.tokenizer(root / "tok", template))
tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]
call = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {}}}],
}
ask, told = (
    {"role": "user", "content": "tide ?"},
    [{"role": "tool", "content": "low"}, {"role": "assistant", "content": "It is low"}],
)
cases = {
    "tools beside messages": ([ask, told[1]], "tide", 0),
    "a call without content": ([ask, call, *told], "<call>", 1),
    "a call with content ''": ([ask, {**call, "content": ""}, *told], "<call>", 1),
    "a call as the last turn": ([ask, {**call, "content": ""}], "<call>", 1),
}
ok = True
for i, (name, (messages, needed, learned)) in enumerate(cases.items()):
    record = {"messages": messages, "tools": tools}
    found, said = common.attempt(lambda i=i, r=record: common.encoded(common.jsonl(root / f"{i}.jsonl", [r]), tok))
    shown = common.text(tok, found[0][learned]) if found else ""
    right = bool(found) and needed in shown and '"name": "tide"' in common.text(tok, found[0][0])
    print(f"{name}: {said or repr(shown)}")
    ok &= right
common.verdict(ok, "the tools are in the prompt, and the calls are learned")
