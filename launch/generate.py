"""Writes texts with a model: `python -m launch.generate (--workdir=RUN | --model=MODEL [--adapter=DIR])
(--prompt=TEXT | --prompts=FILE.jsonl --output=FILE.jsonl | --chat)`.

`--prompt` prints one text as it is written. `--prompts` continues the records of a file, many at a time: each has a
field `prompt`, or `messages`, which the chat template writes; the same command goes on after a stop. `--chat` answers
turn by turn: Ctrl-C ends an answer, Ctrl-D the chat. `--base` shows the answer of the adapter's base beside it.
Bad input is one line on stderr and exit code 2.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from launch import command
from launch.adapters import adapter_of_run
from launch.chat import chat, interruptible, is_utf8
from lowrank import pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core import files
from lowrank.core.errors import UserError, plural
from lowrank.core.exit_codes import STOPPED
from lowrank.core.paths import AnyPath, as_path, is_folder
from lowrank.core.typing import Tokenizer
from lowrank.generation.generate import complete, key_data
from lowrank.generation.generator import BATCH, Request, check_request
from lowrank.generation.prompt_file import Prompt, TextFile, read_prompts
from lowrank.generation.sampling import Sampling
from lowrank.generation.text_stream import TextStream
from lowrank.generation.voice import Voice, check_decoder
from lowrank.models import build_model
from lowrank.pretrained import Pretrained
from lowrank.pretrained.load import PARAM_DTYPES

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Raises UserError for those that do not go together."""
    parser = command.Parser("launch.generate", __doc__)
    add = parser.add_argument
    add("--workdir", help="the folder of a finished run, whose adapter is read")
    add("--model", help="the model: a name, a folder or a hub id; with an adapter, in place of the one it records")
    add("--adapter", help="the folder of an adapter")
    add("--any_base", action="store_true", help="attach the adapter even if it records another base")
    add("--dtype", default="float32", choices=PARAM_DTYPES, help="the dtype of the weights and of the computation")
    add("--prompt", help="a text to continue")
    add("--prompts", help="a JSONL file of prompts")
    add("--output", help="the JSONL file of the texts of --prompts")
    add("--chat", action="store_true", help="talk with the model")
    add("--base", action="store_true", help="with --chat or --prompt: beside the adapter, its base without it")
    add("--as_chat", action="store_true", help="a prompt is a user's turn, which the chat template writes")
    add("--system", default="", help="with --chat: the system's turn")
    add("--max_new", type=int, default=256, help="at most this many new tokens a text")
    add("--temperature", type=float, default=0.0, help="0: the most likely token")
    add("--top_k", type=int, default=0, help="draw from the k most likely tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this total probability")
    add("--min_p", type=float, default=0.0, help="leave out what is less likely than this times the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: what has been said becomes less likely")
    add("--stop", action="append", default=[], help="a string that ends a text; may be given several times")
    add("--seed", type=int, default=0, help="of the random draws")
    add("--rows", type=int, default=BATCH, help="with --prompts: this many texts at a time")
    options = parser.parse_args(list(argv))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in ("workdir", "model", "adapter", "prompts", "output"):
        if getattr(options, name) == "":
            raise UserError(f"--{name} is empty: name one, or leave it out")
    for name in ("prompt", "system", "stop"):
        if not is_utf8("".join(getattr(options, name) or "")):
            raise UserError(f"--{name} holds bytes that are not UTF-8 text")
    if sum((options.prompt is not None, options.prompts is not None, options.chat)) != 1:
        raise UserError("give one of --prompt=TEXT, --prompts=FILE.jsonl and --chat")
    if bool(options.prompts) != bool(options.output):
        raise UserError("--prompts=FILE.jsonl and --output=FILE.jsonl go together: the texts are written there")
    if (options.workdir and options.adapter) or not (options.workdir or options.model or options.adapter):
        raise UserError("give --workdir=RUN, or --model=MODEL, --adapter=DIR or both")
    if options.base and not (options.workdir or options.adapter):
        raise UserError("--base compares an adapter with its base: give --workdir=RUN or --adapter=DIR")
    if options.base and options.prompts:
        raise UserError("--base goes with --chat and --prompt: for a file, write the base's texts to another --output")
    if options.system and not options.chat:
        raise UserError("--system goes with --chat: in a file, a record's messages may begin with a system's turn")
    if options.rows < 1 or options.max_new < 1:
        raise UserError(f"--rows={options.rows} and --max_new={options.max_new} must be 1 or more")
    if not -(2**63) <= options.seed < 2**63:
        raise UserError(f"--seed={options.seed} is not a number of 64 bits")
    TextStream(None, options.stop)  # type: ignore[arg-type]  # it checks the strings
    options.sampling = Sampling(**{name: getattr(options, name) for name in SAMPLING})


def load_model(options: argparse.Namespace) -> Pretrained:
    """The model with the adapter that the options name, if they name one."""
    folder, spec = _source(options)
    if folder is None:
        return pretrained.load(options.model, **_dtypes(options))
    if not is_folder(folder):
        raise UserError(f"{folder} is not a folder: name that of an adapter, which a run leaves in its workdir")
    return load.load_adapted(folder, spec, any_base=options.any_base, flag="--model=MODEL", **_dtypes(options))


def _source(options: argparse.Namespace) -> tuple[AnyPath | None, str | None]:
    """`(folder of the adapter or None, name of the model or None for the one that the adapter records)`."""
    if not options.workdir:
        return as_path(options.adapter) if options.adapter else None, options.model
    folder, spec = adapter_of_run(options.workdir)
    return folder, options.model or spec


def _dtypes(options: argparse.Namespace) -> dict[str, Any]:
    return {"model": {"dtype": options.dtype}, "param_dtype": options.dtype}


def _voices(options: argparse.Namespace) -> dict[str, Voice]:
    model = load_model(options)
    if not options.base:
        return {"model": Voice(model)}
    folder, spec = _source(options)
    assert folder is not None  # `_check` has seen to it
    base = pretrained.load(spec or model.name, **{**_dtypes(options), **adapter_files.base_of(folder)})
    return {"adapter": Voice(model), "base": Voice(base)}


def write_prompt(options: argparse.Namespace) -> None:
    """Prints the text of `--prompt`."""
    voices = _voices(options)
    for name, voice in voices.items():
        tokenizer = voice.pretrained.tokenizer
        ids = Prompt("--prompt", {"prompt": options.prompt}).encode(tokenizer, options.as_chat)
        print(f"[{name}] " if len(voices) > 1 else "", end="", flush=True)
        with interruptible() as interrupted:
            show = lambda part: print(part, end="", flush=True)  # noqa: E731
            voice.write(_request(options, tokenizer, ids, _keys(options, 1)[0]), options.stop, show, interrupted)
        print()


def write_file(options: argparse.Namespace) -> None:
    """Writes the texts of `--prompts`. All records are checked before the model is read."""
    prompts = read_prompts(options.prompts)
    names = ("workdir", "model", "adapter", "dtype", "as_chat", "max_new", "stop", "seed", *SAMPLING)
    settings = {name: getattr(options, name) for name in names}
    with files.held(options.output):
        _write_texts(options, prompts, TextFile(options.output, prompts, settings))


def _write_texts(options: argparse.Namespace, prompts: Sequence[Prompt], texts: TextFile) -> None:
    keys = _keys(options, len(prompts))  # a prompt's key is the same whatever has been written before
    left = [(prompt, key) for prompt, key in zip(prompts, keys, strict=True) if prompt.line not in texts.lines]
    if texts.lines:
        print(f"{options.output} has {len(texts.lines)} of {plural(len(prompts), 'text')}", file=sys.stderr)
    model = load_model(options)
    check_decoder(model)
    tokenizer, requests, start, total = model.tokenizer, [], time.monotonic(), 0
    for prompt, key in left:
        ids = prompt.encode(tokenizer, options.as_chat)
        requests.append(_request(options, tokenizer, ids, key))
        try:
            check_request(model.config, requests[-1])
        except UserError as e:
            raise UserError(f"{prompt.where}: {e}") from None
    stream = TextStream(tokenizer, options.stop, tokenizer.stop_ids)
    network = build_model(model.config)
    for i, tokens in complete(network, model.params, requests, batch_size=options.rows, bind=model.bind):
        ended = tokens[-1] in tokenizer.stop_ids or stream.is_complete(tokens)
        texts.add(left[i][0], stream.text(tokens), len(tokens), "stop" if ended else "length")
        total += len(tokens)
    texts.close()
    seconds = time.monotonic() - start
    print(f"{plural(len(left), 'text')} of {plural(total, 'token')} in {seconds:.1f} s: {options.output}")


def write_chat(options: argparse.Namespace) -> None:
    """Talks until stdin ends."""
    voices = _voices(options)
    first = next(iter(voices.values())).pretrained
    tokenizer, positions = first.tokenizer, first.config.max_length
    if options.max_new >= positions:
        room = plural(positions, "position")
        raise UserError(f"--max_new={options.max_new} leaves no room for a turn: the model has {room}")
    root = jax.random.key(options.seed)

    def build(ids: list[int], number: int) -> Request:
        return _request(options, tokenizer, ids, key_data(jax.random.fold_in(root, number)[None], 1)[0])

    chat(voices, build, tuple(options.stop), options.system, options.max_new)


def _keys(options: argparse.Namespace, count: int) -> np.ndarray:
    return key_data(jax.random.key(options.seed), count)


def _request(options: argparse.Namespace, tokenizer: Tokenizer, ids: list[int], key: np.ndarray) -> Request:
    stop_ids = tuple(tokenizer.stop_ids)
    ends = TextStream(tokenizer, options.stop, stop_ids).is_complete if options.stop else None
    return Request(ids, options.max_new, stop_ids, options.sampling, key, ends)


def main(argv: Sequence[str]) -> None:
    """Writes the texts that the arguments ask for."""
    try:
        options = parse(argv)
        (write_chat if options.chat else write_file if options.prompts else write_prompt)(options)
    except UserError as e:
        command.fail(e)
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
