"""Merges an adapter: `python -m launch.merge (--workdir=RUN | --adapter=DIR [--base=MODEL]) --output=DIR
[--dtype=bfloat16] [--codes=requantize] [--push=ORG/NAME [--public]]`.

The command writes a full Hugging Face checkpoint that transformers loads, and prints the adapter's error by rounding to
the dtype. A quantized base is dequantized before the update is added (`--codes=dequantize`); or the sum is quantized
again, and the checkpoint holds the values of the new codes (`requantize`). A merge is optional: generation and
evaluation need only the folder of the adapter, beside the base that it names. `--push` uploads the checkpoint to the
Hugging Face hub, where the repository is private unless `--public` is given.
Bad input is one line on stderr and exit code 2.
"""

import sys
from collections.abc import Sequence

from launch import adapters, command
from lowrank.adapters import export
from lowrank.core import files
from lowrank.core.errors import UserError
from lowrank.pretrained import hub
from lowrank.pretrained.load import PARAM_DTYPES


def main(argv: Sequence[str]) -> None:
    """Merges the adapter that the arguments describe."""
    parser = command.Parser("launch.merge", __doc__)
    adapters.add_flags(parser)
    add = parser.add_argument
    add("--output", help="where the checkpoint goes: an empty folder, or a new one")
    add("--dtype", default="float32", choices=PARAM_DTYPES, help="the dtype of the stored tensors")
    add("--codes", default="dequantize", choices=export.CODES, help="the treatment of a quantized base")
    add("--labels", default="", help="the names of a classifier's classes, in order: A,B,C")
    add("--push", help="the hub repository ORG/NAME to which the checkpoint is uploaded")
    add("--public", action="store_true", help="make a repository that --push makes public")
    try:
        options = parser.parse_args(argv)
        if not options.output:
            raise UserError("--output=DIR is required")
        if options.push:
            hub.check_push(options.push)
        with files.held(options.output) as output:
            model, labels = adapters.adapted(options), options.labels.split(",") if options.labels else []
            how = {"dtype": options.dtype, "labels": labels, "codes": options.codes}
            print(export.merge_to_hf(model.params, model, output, **how))
            if options.push:
                print(f"pushed to {hub.push(output, options.push, private=not options.public)}")
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
