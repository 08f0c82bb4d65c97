"""Laws of tokenizers: what is encoded is decoded, ends are known, and templates say what their author wrote."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from lowrank.core.errors import UserError
from lowrank.pretrained import convert_tokenizer
from lowrank.pretrained.tokenizer import Tokenizer, load_tokenizer
from tests.support import checkpoint_files as files

CHATML = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}\n{{ bos_token }}assistant:{% endif %}"
)
USER = [{"role": "user", "content": " hi "}]


@pytest.fixture
def folder(tmp_path):
    files.write_tokenizer(tmp_path, 12)
    return tmp_path


def test_ids_and_text_and_ends(folder):
    tokenizer = load_tokenizer(folder, {})
    assert tokenizer.encode("w4 w7 </s>") == [4, 7, 2]
    assert tokenizer.encode_batch(["w4", "w5 w6"]) == [[4], [5, 6]]
    assert tokenizer.decode([4, 7]) == "w4 w7"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 12)
    assert tokenizer.stop_ids == (2,)


def test_padding_and_truncation_that_the_file_asks_for_are_off(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, {}).encode("w4 w5 w6 w7") == [4, 5, 6, 7]


def test_what_surrounds_a_text_is_added_on_request_only(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    tokenizer = Tokenizer(backend, {"cls_token": "<s>", "sep_token": "</s>"})
    assert tokenizer.encode("w4") == [4]
    assert tokenizer.encode_special("w4") == [1, 4, 2]
    assert tokenizer.encode_pair("w4", "w5 w6") == ([1, 4, 2, 5, 6, 2], [0, 0, 0, 1, 1, 1])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


@pytest.mark.parametrize("none", [-1, 99, 2**64, 4.0, "5", [], [-1], True, {}])
def test_what_can_be_no_id_is_none(folder, none):
    files.change_tokenizer(folder, pad_token=None)
    tokenizer = load_tokenizer(folder, {"pad_token_id": none, "bos_token_id": none, "eos_token_id": none})
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.stop_ids) == (2, 2, (2,))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("value", [["w5"], 5, True, {"text": "w5"}, {"content": 5}])
def test_a_special_token_of_another_type_is_named(folder, file, value):
    (folder / file).write_text(json.dumps({"eos_token": value}))
    with pytest.raises(UserError, match=f"{folder / file}: eos_token\\b"):
        load_tokenizer(folder, {})


def test_special_tokens_may_be_objects_or_ids_of_the_model(folder):
    files.change_tokenizer(folder, eos_token={"content": "w5"}, bos_token=None, pad_token=None)
    tokenizer = load_tokenizer(folder, {"bos_token_id": 6, "pad_token_id": 7, "eos_token_id": [8, 5]})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (6, 5, 7)
    assert tokenizer.stop_ids == (5, 8)


def test_generation_stops_where_its_config_says(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 99]}))
    assert load_tokenizer(folder, {"eos_token_id": 4}).stop_ids == (2, 9)


def test_a_tokenizer_without_an_end_is_refused(folder):
    files.change_tokenizer(folder, eos_token=None)
    with pytest.raises(UserError, match="neither an 'eos_token' nor a 'sep_token'"):
        load_tokenizer(folder, {})


@pytest.mark.parametrize(("text", "message"), [(None, r"has no tokenizer\.json"), ("{}", r"tokenizer\.json is not a")])
def test_a_missing_or_corrupt_file_is_named(folder, text, message):
    (folder / "tokenizer.json").unlink() if text is None else (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_a_chat_template_renders_wherever_it_is_kept(folder, place):
    if place == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
        files.change_tokenizer(folder, chat_template=CHATML if place == "config" else named)
    tokenizer = load_tokenizer(folder, {})
    assert tokenizer.chat(USER) == "<s>user: hi</s>\n"
    assert tokenizer.chat(USER, add_generation_prompt=True) == "<s>user: hi</s>\n<s>assistant:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "cannot render"),
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render these messages: division by zero"),
        ("{{ messages | tojson(colour=1) }}", "cannot render"),
        ({"a": 1}, "chat_template is dict, not text"),
        ([{"template": "x"}], "chat_template is a list whose items are not all"),
        ([{"name": "other", "template": "x"}], "unknown chat template 'default'"),
    ],
)
def test_a_template_that_objects_is_one_line(folder, template, message):
    files.change_tokenizer(folder, chat_template=template)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder, {}).chat(USER)
    assert "\n" not in str(error.value)


TAGGED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def test_a_template_marks_what_was_generated(folder):
    files.change_tokenizer(folder, chat_template=TAGGED)
    turns = [*USER, {"role": "assistant", "content": "one"}, *USER, {"role": "assistant", "content": "two"}]
    text, spans = load_tokenizer(folder, {}).render_chat(turns)
    assert text == "user: hi ;assistant:one;user: hi ;assistant:two;"
    assert [text[a:b] for a, b in spans] == ["one", "two"]


def test_the_template_for_tools_is_taken_where_there_are_tools(folder):
    named = [{"name": "tool_use", "template": "{{ tools | tojson }}"}, {"name": "default", "template": "plain"}]
    files.change_tokenizer(folder, chat_template=named)
    tokenizer = load_tokenizer(folder, {})
    assert tokenizer.chat(USER) == "plain"
    assert tokenizer.chat(USER, tools=[{"name": "é"}]) == '[{"name": "é"}]'


def test_offsets_are_those_of_the_text(folder):
    ids, offsets = load_tokenizer(folder, {}).encode_offsets("w4 w5")
    assert (ids, offsets) == ([4, 5], [(0, 2), (3, 5)])


def test_what_is_saved_is_the_same_tokenizer(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(CHATML)
    before = load_tokenizer(folder, {"eos_token_id": 5})
    (tmp_path / "copy").mkdir()
    before.save(tmp_path / "copy")
    after = load_tokenizer(tmp_path / "copy", {"eos_token_id": 5})
    assert after.backend.to_str() == before.backend.to_str()
    assert after.chat(USER) == before.chat(USER)
    assert (after.bos_id, after.eos_id, after.pad_id, after.stop_ids) == (1, 2, 0, (2, 5))


def test_ids_beyond_a_gap_count(tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "</s>": 40}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Tokenizer(backend, {"eos_token": "</s>"}).vocab_size == 41


def test_a_vocabulary_alone_asks_for_what_converts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_tokenizer, "_installed", lambda package: False)
    with pytest.raises(UserError, match=r"has no tokenizer\.json, which every model needs"):
        load_tokenizer(tmp_path, {})
    (tmp_path / "tokenizer.model").write_bytes(b"")
    message = r"only tokenizer\.model, which transformers converts: pip install transformers sentencepiece protobuf"
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path, {})
