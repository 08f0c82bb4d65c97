"""Merges an adapter: `python -m launch.merge (--workdir=RUN | --adapter=DIR [--base=MODEL]) --output=DIR
[--dtype=bfloat16] [--codes=requantize] [--push=ORG/NAME [--public]]`.

The command writes a full Hugging Face checkpoint that transformers loads, and prints the adapter's error by rounding to
the dtype. A quantized base is dequantized before the update is added (`--codes=dequantize`); or the sum is quantized
again, and the checkpoint holds the values of the new codes (`requantize`). A merge is optional: generation and
evaluation need only the folder of the adapter, beside the base that it names. `--push` uploads the checkpoint to the
Hugging Face hub, where the repository is private unless `--public` is given.
Bad input is one line on stderr and exit code 2.
"""

from collections.abc import Sequence

from absl import app, flags

from launch import adapters, command
from lowrank.adapters import export
from lowrank.core.errors import UserError
from lowrank.core.paths import as_local_path
from lowrank.pretrained import hub

_OUTPUT = flags.DEFINE_string("output", None, "Where the checkpoint goes: an empty folder, or a new one.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "The dtype of the stored tensors: float32 or bfloat16.")
_CODES = flags.DEFINE_enum("codes", "dequantize", export.CODES, "The treatment of a quantized base.")
_LABELS = flags.DEFINE_list("labels", [], "The names of a classifier's classes, in order.")
_PUSH = flags.DEFINE_string("push", None, "The hub repository ORG/NAME to which the checkpoint is uploaded.")
_PUBLIC = flags.DEFINE_bool("public", False, "Make a repository that --push makes public.")


def main(argv: Sequence[str]) -> None:
    """Merges the adapter that the flags describe."""
    del argv
    try:
        if not _OUTPUT.value:
            raise UserError("--output=DIR is required")
        if _PUSH.value:
            hub.check_push(_PUSH.value)
        output, model = as_local_path(_OUTPUT.value), adapters.adapted()
        options = {"dtype": _DTYPE.value, "labels": _LABELS.value, "codes": _CODES.value}
        print(export.merge_to_hf(model.params, model, output, **options))
        if _PUSH.value:
            print(f"pushed to {hub.push(output, _PUSH.value, private=not _PUBLIC.value)}")
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
