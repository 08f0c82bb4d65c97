"""A text is printed as its tokens arrive: whole characters alone, and no part of a stop string."""

import pytest

from lowrank.core.errors import UserError
from lowrank.generation.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, special=False):
        return bytes(ids).decode("utf-8", errors="replace")


def pushed(text, stop=()):
    ids, stream = list(text.encode()), TextStream(Bytes(), stop)
    return [stream.push(ids[: i + 1], last=i + 1 == len(ids)) for i in range(len(ids))]


def test_no_half_character_is_printed():
    parts = pushed("aé€😀.")
    assert [part for part in parts if part] == ["a", "é", "€", "😀", "."]
    assert TextStream(Bytes()).push("é".encode()[:1], last=True) == "\ufffd"


def test_what_may_begin_a_stop_string_is_held_back():
    assert pushed("one END two", ["END"])[:5] == ["o", "n", "e", " ", ""]
    assert "".join(pushed("one END two", ["END"])) == "one "
    assert "".join(pushed("one EN", ["END"])) == "one EN"
    assert "".join(pushed("a<<b>>c", ["<b>>", "zz"])) == "a<"


def test_stop_tokens_are_no_part_of_the_text():
    stream = TextStream(Bytes(), ["x"], stop_ids=[0])
    assert (stream.text([65, 0]), stream.is_complete([65, 0]), stream.is_complete([120])) == ("A", False, True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(Bytes(), [""])
