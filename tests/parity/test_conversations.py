"""Conversations have the ids that transformers gives them, and the tokens are learned that it marks as generated."""

import pytest
import transformers

from lowrank.data.chat import Chat
from lowrank.data.language import LanguageEncoder
from lowrank.pretrained.tokenizer import Tokenizer
from tests.support.chat_tokenizers import KINDS, conversations

COUNT = 200


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """`(ours, transformers' tokenizer, conversations)`."""
    backend, template, special, system = KINDS[request.param]()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    ours = Tokenizer(backend, {**special, "chat_template": template})
    return ours, theirs, conversations(COUNT, list(special.values()), system)


def encode(ours, turns):
    encoder = LanguageEncoder(Chat(ours), ours, length=4000, prompt_weight=0.0)
    [sequence], cut = encoder({"messages": turns}, "r")
    assert not cut
    ids = [sequence["tokens"][0], *sequence["targets"]]
    return ids, [0, *sequence["weights"].astype(int)]


def test_ids_and_what_is_learned_are_those_of_transformers(pair):
    ours, theirs, talks = pair
    learned = 0
    for turns in talks:
        found = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encode(ours, turns)
        assert ids == found["input_ids"], turns
        assert mask == found["assistant_masks"], turns
        learned += sum(mask)
    assert learned > COUNT


def test_prompts_are_those_of_transformers(pair):
    ours, theirs, talks = pair
    encoder = LanguageEncoder(Chat(ours), ours, length=4000, prompt_weight=0.0)
    for turns in talks:
        text = theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert encoder.prompt({"messages": turns}, "r", 0) == (text, expected)


def test_tools_are_written_as_transformers_writes_them():
    backend, template, special, _ = KINDS["qwen"]()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    ours = Tokenizer(backend, {**special, "chat_template": template})
    tools = [{"type": "function", "function": {"name": "tide", "description": "à <b>"}}]
    talk = [{"role": "user", "content": "?"}]
    assert ours.chat(talk, tools=tools) == theirs.apply_chat_template(talk, tools=tools, tokenize=False)
