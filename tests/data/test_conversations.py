"""Conversations in ShareGPT's form and in TRL's, and turns that are not learned."""

import pytest

from lowrank.core.errors import UserError
from lowrank.data.chat import Chat
from lowrank.data.config import DataConfig
from lowrank.data.conversations import CONVERSATIONS
from lowrank.data.render import build_renderer
from lowrank.data.sources import open_source

TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]
CALL = {"from": "function_call", "value": '{"name": "tide", "arguments": {"at": "Wells"}}'}


def learned(tokenizer, record, form):
    return [text for text, learns in Chat(tokenizer, form=CONVERSATIONS[form]).pieces(record, "r") if learns]


def test_a_conversation_of_sharegpt_is_that_of_its_messages(tokenizer):
    for turns in (SHAREGPT, TURNS):
        record = {"conversations": turns, "system": "Be brief."}
        pieces = Chat(tokenizer, form=CONVERSATIONS["conversations"]).pieces(record, "r")
        assert pieces == Chat(tokenizer).pieces({"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}, "r")


def test_calls_and_their_results_are_turns(tokenizer):
    turns = [SHAREGPT[0], CALL, {"from": "observation", "value": "low"}, SHAREGPT[3]]
    found = CONVERSATIONS["conversations"].read({"conversations": turns}, "r")
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"] == [{"type": "function", "function": {"name": "tide", "arguments": {"at": "Wells"}}}]


def test_of_a_pair_of_turns_the_completion_alone_is_learned(tokenizer):
    record = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert learned(tokenizer, record, "turns") == ["Second.<|im_end|>\n"]
    shorter = Chat(tokenizer, form=CONVERSATIONS["turns"]).without_oldest(record, "r")
    assert (shorter["prompt"], shorter["completion"]) == (TURNS[2:3], TURNS[3:])


def test_an_answer_of_weight_0_is_not_learned(tokenizer):
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    assert learned(tokenizer, {"messages": turns}, "messages") == ["Second.<|im_end|>\n"]


class Marking:
    """A template that marks what is generated; without `every`, the last answer alone."""

    stop_ids = ()

    def __init__(self, every):
        self.every = every

    def render_chat(self, messages, add_generation_prompt=False):
        text, spans = "", []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and (self.every or i == len(messages) - 1):
                spans.append((len(text) + 1, len(text) + 1 + len(message["content"])))
            text += f"[{message['content']}]"
        return text, spans


def test_what_a_template_marks_is_learned_unless_its_weight_is_0():
    record = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert learned(Marking(True), record, "turns") == ["Second."]
    assert learned(Marking(False), {"messages": TURNS}, "messages") == ["Second."]
    with pytest.raises(UserError, match="marks 1 of 2 answers as generated, so that those with the weight 0 cannot"):
        learned(Marking(False), record, "turns")


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, "turns"),
    ],
)
def test_auto_takes_the_form_of_the_first_record(tokenizer, write, tmp_path, record, form):
    source = open_source(write([record]), "train", tmp_path)
    assert build_renderer(DataConfig(), "auto", tokenizer, source).form is CONVERSATIONS[form]


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        ({"conversations": [{"from": "humn", "value": "x"}]}, "conversations", r"'humn' \(did you mean 'human'\?\)"),
        ({"conversations": [{**CALL, "value": "tide"}]}, "conversations", "turn 1 .*function_call must be JSON with"),
        ({"conversations": [{"from": "gpt"}]}, "conversations", "turn 1 of conversations needs a role and a content"),
        ({"messages": [{**TURNS[0], "weight": 0.5}]}, "messages", "turn 1 of messages has the weight 0.5"),
        ({"prompt": "text", "completion": TURNS[:1]}, "turns", "prompt must be a list of turns"),
        ({"prompt": TURNS[:1]}, "turns", "the record has no field 'completion'"),
        ({"prompt": TURNS[:1], "completion": TURNS[:1]}, "turns", "prompt and completion must end with an assistant's"),
    ],
)
def test_a_record_that_is_no_conversation_is_named(tokenizer, record, form, message):
    with pytest.raises(UserError, match=f"f:2: .*{message}"):
        Chat(tokenizer, form=CONVERSATIONS[form]).pieces(record, "f:2")
