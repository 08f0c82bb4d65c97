"""Merges: `python -m launch.merge (--workdir=RUN | --adapter=DIR [--base=MODEL]) --output=DIR [--dtype=bfloat16]
[--codes=requantize]`.

Writes a full Hugging Face checkpoint that transformers loads, and prints what rounding to the dtype cost the adapter.
A base in codes becomes the values of its codes, plus the update (`--codes=dequantize`); or the sum is quantized again,
and the checkpoint holds the values of the new codes (`requantize`). Without a merge, nothing is lost: the folder of the
adapter, beside the base that it names, is all that generation and evaluation need.
Bad input is one line on stderr and exit code 2.
"""

from collections.abc import Sequence

from absl import app, flags

from launch import adapters, command
from lowrank.adapters import export
from lowrank.core.errors import UserError

_OUTPUT = flags.DEFINE_string("output", None, "Where the checkpoint goes: an empty folder, or a new one.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "What tensors are stored in: float32 or bfloat16.")
_CODES = flags.DEFINE_enum("codes", "dequantize", export.CODES, "What becomes of a quantized base.")
_LABELS = flags.DEFINE_list("labels", [], "The names of a classifier's classes, in order.")


def main(argv: Sequence[str]) -> None:
    """Merges as the flags describe."""
    del argv
    try:
        if not _OUTPUT.value:
            raise UserError("--output=DIR is required")
        model = adapters.adapted()
        options = {"dtype": _DTYPE.value, "labels": _LABELS.value, "codes": _CODES.value}
        print(export.merge_to_hf(model.params, model, _OUTPUT.value, **options))
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
