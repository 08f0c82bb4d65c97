"""The command that writes texts: one, many from a file, and a chat; and what it refuses before it computes."""

import dataclasses
import io
import json
import signal

import jax
import pytest

from launch import generate as command
from launch.chat import interruptible
from lowrank import methods, pretrained
from lowrank.adapters import peft
from lowrank.core import files, weight
from lowrank.core.errors import UserError
from lowrank.generation import generate
from lowrank.generation.conversation import Conversation
from lowrank.generation.generator import Request
from lowrank.generation.prompt_file import TextFile, read_prompts
from lowrank.generation.voice import Voice
from tests.support import tiny_checkpoint

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('an odd role') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}who :{% endif %}"
)
PROMPTS = ("the cat sat", "a dog", "the big red moon saw the sun", "what is", "who ate the small blue cat :")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_checkpoint.llama(tmp_path_factory.mktemp("model"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def base(folder):
    return pretrained.load(str(folder))


def run(capsys, *arguments):
    """`(stdout, stderr)` of the command."""
    command.main(arguments)
    return capsys.readouterr()


def refused(capsys, *arguments):
    """The line of the command's error."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_file_of_prompts_is_completed_after_a_stop_and_only_by_the_same_settings(capsys, folder, base, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "texts.jsonl"
    records = [*({"prompt": p} for p in PROMPTS), {"messages": [{"role": "user", "content": "the sun"}]}]
    prompts.write_text("\n\n".join(map(json.dumps, records)))
    flags = (f"--model={folder}", f"--prompts={prompts}", f"--output={output}", "--max_new=6", "--rows=2")
    assert "6 texts of" in run(capsys, *flags).out
    whole = output.read_text()
    texts = [json.loads(line) for line in whole.splitlines()]
    assert [text["line"] for text in texts] == [1, 3, 5, 7, 9, 11]
    rendered = [*PROMPTS, "user the sun who :"]
    assert [text["text"] for text in texts] == generate.texts(base, base.params, rendered, max_new=6)
    assert all(text["end"] == ("length" if text["tokens"] == 6 else "stop") for text in texts)

    output.write_text("\n".join(whole.splitlines()[1:4]) + "\n" + whole.splitlines()[4][:9])
    assert "has 3 of 6 texts" in run(capsys, *flags).err
    assert output.read_text() == whole
    assert "0 texts" in run(capsys, *flags).out
    assert "texts.jsonl:1 was written by other settings" in refused(capsys, *flags, "--temperature=0.5")
    prompts.write_text(json.dumps({"prompt": "another"}))
    assert "texts.jsonl:1 was written for another prompt" in refused(capsys, *flags)
    output.write_text("notes\n")
    assert "texts.jsonl:1 is not a text of this command" in refused(capsys, *flags)
    assert output.read_text() == "notes\n"
    output.write_text("an essay in one line")
    assert "texts.jsonl:1 is not a text of this command" in refused(capsys, *flags)
    assert output.read_text() == "an essay in one line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', ":2: 'prompt' must be text, not int"),
        ('{"text": "a"}', ":2: a prompt has either 'prompt' or 'messages'; this record has 'text'"),
        ('{"prompt": "a", "messages": []}', "this record has 'prompt', 'messages'"),
        ('{"messages": []}', ":2: 'messages' must be a list of turns"),
        ("{", ":2: the line is not JSON"),
    ],
)
def test_a_bad_line_is_said_before_the_model_is_read(capsys, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "the"}}\n{line}\n')
    flags = (f"--prompts={path}", "--model=there-is-none", f"--output={tmp_path / 'out.jsonl'}")
    assert message in refused(capsys, *flags)


def test_an_output_that_cannot_be_written_is_said_before_the_model_is_read(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the"}\n')
    flags = (f"--prompts={path}", "--model=there-is-none", f"--output={path / 'out.jsonl'}")
    assert "cannot write" in refused(capsys, *flags)


def test_prompts_that_cannot_be_continued_are_named_before_anything_is_computed(capsys, folder, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    flags = (f"--prompts={path}", f"--model={folder}", f"--output={output}", "--max_new=60")
    for record, message in (
        ({"prompt": ""}, "prompts.jsonl:2: a prompt is empty"),
        ({"prompt": "the cat sat on a"}, r"prompts.jsonl:2: a prompt of 5 tokens + max_new=60 exceeds"),
        ({"messages": [{"role": "odd", "content": ""}]}, "prompts.jsonl:2: the chat template cannot render"),
    ):
        path.write_text(f'{{"prompt": "the"}}\n{json.dumps(record)}\n')
        assert message in refused(capsys, *flags)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --prompt=TEXT, --prompts=FILE.jsonl and --chat"),
        (("--prompt=a", "--chat"), "give one of --prompt"),
        (("--chat",), "give --workdir=RUN, or --model=MODEL"),
        (("--chat", "--model=m", "--base"), "--base compares an adapter with its base"),
        (("--prompts=p", "--model=m"), "go together"),
        (("--prompt=a", "--model=m", "--top_p=2"), "top_p=2.0 is not in"),
        (("--prompt=a", "--model=m", "--top_k=9999999999"), "top_k=9999999999 is not in"),
        (("--prompt=a", "--model=m", f"--seed={2**63}"), "is not a number of 64 bits"),
        (("--prompt=\udcff", "--model=m"), "--prompt holds bytes that are not UTF-8"),
        (("--prompts=", "--model=m"), "--prompts is empty"),
        (("--prompt=a", "--model=m", "--stop="), "a stop string is empty"),
        (("--prompt=a", "--model=m", "--max_new=0"), "--max_new=0 must be 1 or more"),
        (("--prompt=a", "--model=m", "--system=b"), "--system goes with --chat"),
        (("--prompt=a", "--adapter=nowhere"), "nowhere is not a folder"),
        (("--prompt=a", "--workdir=nowhere"), "nowhere is not the folder of a run"),
        (("--prompts=nowhere", "--model=m", "--output=o"), "nowhere is not a file"),
        (("--prompt=a", "--modle=m"), "unrecognized arguments: --modle=m"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_chat_without_room_for_a_turn_is_refused(capsys, folder):
    message = "--max_new=99999 leaves no room for a turn: the model has"
    assert message in refused(capsys, f"--model={folder}", "--chat", "--max_new=99999")


def test_an_encoder_writes_no_text(capsys, tmp_path):
    path = tiny_checkpoint.bert(tmp_path / "bert")
    assert "is an encoder, which writes no text" in refused(capsys, f"--model={path}", "--prompt=the")


def test_an_adapter_writes_beside_its_base(capsys, folder, base, tmp_path):
    group = {"name": "lora", "rank": 2}
    params = methods.attach(methods.build_method(group), base.params, jax.random.key(0))
    params = jax.tree.map(lambda w: _moved(w) if weight.is_weight(w) else w, params, is_leaf=weight.is_weight)
    peft.save(params, base, tmp_path / "adapter", method=group)
    flags = (f"--adapter={tmp_path / 'adapter'}", f"--model={folder}", "--base", "--prompt=the cat", "--max_new=5")
    out = run(capsys, *flags).out
    texts = [generate.texts(base, p, ["the cat"], max_new=5)[0] for p in (params, base.params)]
    assert out == "[adapter] {}\n[base] {}\n".format(*texts)
    assert texts[0] != texts[1]


def _moved(w):
    return dataclasses.replace(w, b=w.b + 3.0)


def test_a_chat_keeps_its_turns_until_they_no_longer_fit(capsys, folder, monkeypatch):
    turns = [
        "the cat",
        "/sytem",
        "/system a dog",
        "a big moon sat on the sun",
        "the red sun",
        "a " * 60,
        "what \udcff",  # a byte that is not UTF-8
        "what",
        "/exit",
        "no",
    ]
    lines = "\n".join(turns).encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    out, err = run(capsys, f"--model={folder}", "--chat", "--max_new=24", "--temperature=1", "--seed=3")
    assert len(out.splitlines()) == 4  # one for each turn that fits
    assert "unknown command '/sytem' (did you mean '/system'?)" in err
    assert "the oldest 1 exchange no longer fit into 64 positions" in err
    assert "error: this has" in err
    assert "error: this line holds bytes that are not UTF-8 text" in err


def test_a_conversation_leaves_out_its_oldest_exchanges_and_keeps_the_system_turn(base):
    talk = Conversation(base.tokenizer, "the sun")
    decode = lambda ids: base.tokenizer.decode(ids, special=True)  # noqa: E731
    assert decode(talk.ask("a cat", 50)) == "[UNK] the sun [UNK] a cat who :"
    talk.answer("is big")
    ids = talk.ask("a dog", 50)
    assert decode(ids) == "[UNK] the sun [UNK] a cat [UNK] is big [UNK] a dog who :"
    talk.answer("is red")
    assert decode(talk.ask("what", len(ids))) == "[UNK] the sun [UNK] a dog [UNK] is red [UNK] what who :"
    assert talk.dropped == 1
    with pytest.raises(UserError, match="this has 7 tokens and 6 fit"):
        talk.ask("what", 6)
    assert [turn["content"] for turn in talk.turns] == ["a dog", "is red", "what"]


def test_an_interruption_ends_the_text_and_not_the_program(base):
    parts, before = [], signal.getsignal(signal.SIGINT)
    with interruptible() as interrupted:

        def show(part):
            parts.append(part)
            if len(parts) == 3:
                signal.raise_signal(signal.SIGINT)

        text = Voice(base).write(Request(base.tokenizer.encode("the cat"), 20), (), show, interrupted)
    assert text == "".join(parts)
    assert len(text.split()) == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_quantized_base_writes_what_its_kernels_write(folder, base):
    coded = pretrained.load(str(folder), quantized={"name": "int8"})
    plain = weight.merge(coded.params)
    prompts = list(PROMPTS[:2])
    assert generate.texts(coded, coded.params, prompts, max_new=6) == generate.texts(coded, plain, prompts, max_new=6)


def test_a_full_disk_is_one_line_and_tools_are_objects(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    prompts = read_prompts(tmp_path / "in.jsonl")
    texts = TextFile(tmp_path / "out.jsonl", prompts, {})
    texts._file = open("/dev/full", "w")  # noqa: SIM115  # a device that refuses every byte
    with pytest.raises(UserError, match=r"cannot write .*out\.jsonl: No space left on device: the same command"):
        texts.add(prompts[0], "b", 1, "stop")
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "tools": {"name": "f"}}\n')
    with pytest.raises(UserError, match=r"in\.jsonl:1: 'tools' must be a list of objects, not \{"):
        read_prompts(tmp_path / "in.jsonl")


def test_two_commands_on_one_output_do_not_mix(capsys, folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a dog"}\n')
    with files.held(tmp_path / "out.jsonl"):
        arguments = f"--model={folder}", f"--prompts={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"
        assert "out.jsonl is written by another process" in refused(capsys, *arguments)
