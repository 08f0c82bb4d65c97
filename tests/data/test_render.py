"""Conversations: which parts are learned, for templates that keep earlier turns and for those that rewrite them."""

import pytest

from lowrank.core.errors import UserError
from lowrank.data.chat import Chat, turns
from lowrank.data.render import Plain
from lowrank.data.templates import TEMPLATES

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two, please?"},
    {"role": "assistant", "content": "Second."},
]


def record(*messages):
    return {"messages": [dict(m) for m in messages]}


def test_every_answer_of_a_conversation_is_learned_and_the_rest_is_prompt(tokenizer):
    pieces = Chat(tokenizer).pieces(record(*DIALOGUE), "r")
    assert "".join(text for text, _ in pieces) == tokenizer.chat(DIALOGUE)
    assert [text for text, learned in pieces if learned] == ["First.<|im_end|>\n", "Second.<|im_end|>\n"]


def test_the_prompt_ends_where_the_last_answer_begins(tokenizer):
    chat = Chat(tokenizer)
    pieces = chat.pieces(record(*DIALOGUE), "r")
    assert chat.prompt(record(*DIALOGUE), "r") == "".join(text for text, _ in pieces[:-1])
    assert chat.answer(record(*DIALOGUE), "r") == "Second."


def test_only_the_longest_of_the_users_turns_is_shortened(tokenizer):
    chat = Chat(tokenizer)
    assert chat.long_text(record(*DIALOGUE), "r") == "Two, please?"
    shorter = chat.prompt(record(*DIALOGUE), "r", long="Tw")
    assert "Tw<|im_end|>" in shorter
    assert "One?<|im_end|>" in shorter


def test_a_template_becomes_a_users_and_an_assistants_turn(tokenizer):
    chat = Chat(tokenizer, TEMPLATES["headline"])
    news = {"text": "body", "title": "T"}
    assert chat.pieces(news, "r") == [
        ("<|im_start|>user\nbody\n\nHeadline:<|im_end|>\n<|im_start|>assistant\n", False),
        ("T<|im_end|>\n", True),
    ]
    assert chat.prompt(news, "r", long="bo").startswith("<|im_start|>user\nbo\n\n")
    assert chat.answer(news, "r") == "T"


def test_plain_text_joins_prompt_and_completion_as_they_are():
    plain = Plain(TEMPLATES["plain"])
    pair = {"prompt": "Q: why? A:", "completion": " because"}
    assert plain.pieces(pair, "r") == [("Q: why? A:", False), (" because", True)]
    assert (plain.prompt(pair, "r"), plain.answer(pair, "r")) == ("Q: why? A:", "because")
    assert not plain.document
    assert Plain(TEMPLATES["text"]).document


class Forgetful:
    """Leaves a thought in the last answer only, as reasoning models' templates do."""

    def render_chat(self, messages, add_generation_prompt=False):
        last = len(messages) - 1
        thought = ["<think></think>" if m["role"] == "assistant" and i == last else "" for i, m in enumerate(messages)]
        text = "".join(f"[{m['role']}]{t}{m['content']}." for m, t in zip(messages, thought, strict=True))
        return text + ("[assistant]" if add_generation_prompt else ""), []


def test_an_answer_that_the_template_rewrites_later_is_found_by_its_text():
    pieces = turns(Forgetful(), DIALOGUE, "r")
    assert [text for text, learned in pieces if learned] == ["First..", "<think></think>Second.."]
    assert "".join(text for text, _ in pieces) == Forgetful().render_chat(DIALOGUE)[0]


def test_a_users_words_are_not_taken_for_the_answer_that_repeats_them():
    echo = [{**m, "content": "One?"} for m in DIALOGUE]
    pieces = turns(Forgetful(), echo, "r")
    assert next(text for text, _ in pieces) == "[system]One?.[user]One?.[assistant]"
    assert sum(learned for _, learned in pieces) == 2


def test_an_answer_that_the_template_leaves_out_counts_as_prompt():
    class Last(Forgetful):
        def render_chat(self, messages, add_generation_prompt=False):
            gone = [{**m, "content": "..." if m["role"] == "assistant" else m["content"]} for m in messages[:-1]]
            return super().render_chat([*gone, messages[-1]], add_generation_prompt)

    pieces = turns(Last(), DIALOGUE, "r")
    assert [text for text, learned in pieces if learned] == ["<think></think>Second.."]


class Reversed:
    def render_chat(self, messages, add_generation_prompt=False):
        return "".join(m["content"] for m in reversed(messages)), []


def test_a_template_that_puts_the_answer_first_is_refused():
    with pytest.raises(UserError, match="r: the chat template does not write the last answer after its prompt"):
        turns(Reversed(), DIALOGUE, "r")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "f:2: messages must be a list of turns"),
        ("hello", "f:2: messages must be a list of turns"),
        ([{"role": "user"}], "f:2: turn 1 of messages needs a role and a content"),
        (["hello"], "f:2: turn 1 of messages needs a role and a content"),
        (DIALOGUE[:2], "f:2: messages must end with an assistant's turn"),
        (DIALOGUE[2:3], "f:2: messages must end with an assistant's turn"),
        ([DIALOGUE[1], {"role": "assistant", "content": " "}], "f:2: turn 2: empty completion"),
        ([DIALOGUE[0], DIALOGUE[2]], "f:2: a conversation needs a turn of the user"),
        ([DIALOGUE[1], {"role": "assistant", "content": None}], "f:2: turn 2 of messages needs a role and a content"),
        ([DIALOGUE[1], {"role": "assistant", "content": float("nan")}], "f:2: turn 2 of messages needs a role"),
        (
            [DIALOGUE[1], {"role": "assistant", "content": [{"type": "text"}]}],
            "f:2: turn 2 of messages has a content",
        ),
        ([DIALOGUE[1], {"role": "assistant", "tool_calls": "x"}], "f:2: turn 2 of messages: tool_calls must be a list"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(tokenizer, messages, message):
    with pytest.raises(UserError, match=message):
        Chat(tokenizer).long_text({"messages": messages}, "f:2")


def test_a_record_without_messages_is_named(tokenizer):
    with pytest.raises(UserError, match="f:2: the record has no field 'messages'"):
        Chat(tokenizer).pieces({"text": "x"}, "f:2")


@pytest.mark.parametrize("tools", [5, "no JSON", {"name": "x"}, '{"name": 1}'])
def test_tools_that_are_no_list_are_named(tokenizer, tools):
    with pytest.raises(UserError, match="f:2: tools must be a list, not"):
        Chat(tokenizer).pieces({"messages": DIALOGUE, "tools": tools}, "f:2")
