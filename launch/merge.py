"""Merges: `python -m launch.merge (--workdir=RUN | --adapter=DIR [--base=MODEL]) --output=DIR [--dtype=bfloat16]`.

Writes a full Hugging Face checkpoint that transformers loads, and prints what rounding to the dtype cost the adapter.
Bad input is one line on stderr and exit code 2.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from lowrank import merging, train, workdir
from lowrank.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a finished run, whose adapter is merged into its base.")
_ADAPTER = flags.DEFINE_string("adapter", None, "The folder of an adapter, in place of --workdir.")
_BASE = flags.DEFINE_string("base", None, "The model, if not the one that the adapter records.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the checkpoint goes: an empty folder, or a new one.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "What tensors are stored in: float32 or bfloat16.")
_LABELS = flags.DEFINE_list("labels", [], "The names of a classifier's classes, in order.")
_ANY_BASE = flags.DEFINE_bool("any_base", False, "Merge even if the adapter records another base.")


def main(argv: Sequence[str]) -> None:
    """Merges as the flags describe."""
    del argv
    try:
        directory, spec = _source()
        if not _OUTPUT.value:
            raise UserError("--output=DIR is required")
        model = merging.adapted(directory, spec, any_base=_ANY_BASE.value)
        print(merging.merge_to_hf(model.params, model, _OUTPUT.value, dtype=_DTYPE.value, labels=_LABELS.value))
    except UserError as e:
        _fail(e)


def _source() -> tuple[Path, str | None]:
    """`(folder of the adapter, model)`."""
    if bool(_WORKDIR.value) == bool(_ADAPTER.value):
        raise UserError("name one of --workdir=RUN and --adapter=DIR")
    if _ADAPTER.value:
        return Path(_ADAPTER.value), _BASE.value
    config = Path(_WORKDIR.value) / workdir.CONFIG
    try:
        model = json.loads(config.read_text())["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{_WORKDIR.value} is not the folder of a run: {config}: {e}") from None
    return Path(_WORKDIR.value) / train.ADAPTER, _BASE.value or model


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parser for `app.run`, with one line for a bad flag."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag")
        return rest
    except (flags.Error, UserError) as e:
        return _fail(e)


def _fail(error: Exception) -> Any:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
