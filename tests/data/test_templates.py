"""Templates: what fields become, and what is said about a field that is not there."""

import pytest

from lowrank.core.errors import UserError
from lowrank.data.templates import TEMPLATES, resolve


def written(name, fields, completion="", long="", chat=False):
    return resolve(name, completion, long, chat, fields, "news")


def test_the_headline_template_asks_for_the_title_of_a_text():
    template = written("headline", ("title", "text", "label"))
    assert template.render({"title": "T", "text": "body", "label": "x"}, "r") == ("body\n\nHeadline:", " T")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (("prompt", "completion", "text"), "plain"),
        (("instruction", "output"), "alpaca"),
        (("label", "text", "title"), "headline"),
        (("text", "label"), "text"),
    ],
)
def test_auto_takes_the_template_that_fits_the_fields(fields, name):
    assert written("auto", fields) == TEMPLATES[name]


def test_auto_takes_messages_for_conversations():
    assert written("auto", ("messages", "text")) is None


def test_auto_says_what_fields_there_are_when_none_fits():
    with pytest.raises(UserError, match=r"none of the templates fits news: set data\.template; its fields: body, head"):
        written("auto", ("head", "body"))


def test_a_written_template_keeps_braces_and_values_with_braces():
    template = written("{{{q}}} of {text}?", ("q", "text", "a"), completion=" {a}")
    assert template.render({"q": "{text}", "text": "{{}}", "a": 7}, "r") == ("{{text}} of {{}}?", " 7")
    assert template.long == "text"


def test_a_written_prompt_without_completion_is_a_document():
    assert written("{title}: {text}", ("title", "text")).render({"title": "T", "text": "b"}, "r") == ("", "T: b")


def test_the_long_field_defaults_to_the_last_of_the_prompt():
    assert written("{q} {body}", ("q", "body", "a"), completion="{a}").long == "body"
    assert written("{q} {body}", ("q", "body", "a"), completion="{a}", long="q").long == "q"


def test_alpaca_has_a_prompt_of_its_own_for_records_without_input():
    template = written("alpaca", ("instruction", "output"))
    prompt, _ = template.render({"instruction": "Do.", "output": "Done.", "input": " "}, "r")
    with_input, _ = template.render({"instruction": "Do.", "output": "Done.", "input": "this"}, "r")
    assert "### Input" not in prompt
    assert "paired" not in prompt
    assert "### Input:\nthis\n\n### Response:\n" in with_input
    assert template.long_text({"instruction": "Do.", "output": "Done."}, "r") == ""


def test_a_list_gives_its_first_item():
    template = written("{q}", ("q", "answers.text"), completion=" {answers.text}")
    assert template.render({"q": "?", "answers.text": ["one", "two"]}, "r") == ("?", " one")


@pytest.mark.parametrize(
    ("name", "completion", "long", "message"),
    [
        ("headlin", "", "", r"unknown template 'headlin' \(did you mean 'headline'\?\)"),
        ("{txt}", "{title}", "", r"template field 'txt' is not in news \(did you mean 'text'\?\)"),
        ("plain", "", "", "template field 'prompt' is not in news"),
        ("{text", "{title}", "", r"template '\{text': expected '\}'"),
        ("{}", "{title}", "", "a field is written {name}"),
        ("{text!r}", "{title}", "", "a field is written {name}"),
        ("{text:>8}", "{title}", "", "a field is written {name}"),
        ("{text}", "{title}", "tex", r"unknown template field 'tex' \(did you mean 'text'\?\)"),
        ("messages", "", "", "template field 'messages' is not in news"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(name, completion, long, message):
    with pytest.raises(UserError, match=message):
        written(name, ("text", "title"), completion, long)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, "f:3: the record has no field 'completion'"),
        ({"prompt": "p", "compleiton": "c"}, r"f:3: .* 'completion' \(did you mean 'compleiton'\?\)"),
        ({"prompt": "p", "completion": " \n"}, "f:3: empty completion"),
        ({"prompt": "p", "completion": None}, "f:3: field 'completion' is NoneType, not text"),
        ({"prompt": True, "completion": "c"}, "f:3: field 'prompt' is bool, not text"),
        ({"prompt": {"a": 1}, "completion": "c"}, "f:3: field 'prompt' is dict, not text"),
    ],
)
def test_a_record_that_does_not_fill_the_template_is_named(record, message):
    with pytest.raises(UserError, match=message):
        TEMPLATES["plain"].render(record, "f:3")


def test_an_empty_document_is_named():
    with pytest.raises(UserError, match="f:3: empty text"):
        TEMPLATES["text"].render({"text": ""}, "f:3")
