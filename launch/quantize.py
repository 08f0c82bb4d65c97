"""Quantizes a base: `python -m launch.quantize --model=smollm2-135m --scheme=nf4:double=true --output=DIR`.

The schemes are those of `model.quantize`, and gptq and awq, which are calibrated by data:
`--scheme=gptq:bits=4,block=64 --data=jsonl:records.jsonl`. The output is a folder as Hugging Face writes it, with codes
in place of kernels (`lowrank.pretrained.quantized_checkpoint`). A config reads it by `model.name=DIR`, and every method
can be attached. Bad input is one line on stderr and exit code 2.
"""

import sys
from collections.abc import Sequence

from launch import command
from lowrank import data, quantization
from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.pretrained.load import PARAM_DTYPES


def main(argv: Sequence[str]) -> None:
    """Quantizes the base that the arguments describe."""
    parser = command.Parser("launch.quantize", __doc__)
    add = parser.add_argument
    add("--model", help="the model: a name, a folder, a .gguf file, or org/name of the hub")
    add("--scheme", default="nf4", help="NAME or NAME:KEY=VALUE,...")
    add("--output", help="where the base goes: an empty folder, or a new one")
    add("--dtype", default="float32", choices=PARAM_DTYPES, help="the dtype of unquantized tensors")
    add("--data", help="the calibration data of gptq and awq: data.source of a config")
    add("--split", default="train", help="its split")
    add("--template", default="auto", help="the template of a record: data.template of a config")
    add("--rows", type=int, default=64, help="the number of rows that are read")
    add("--seq_len", type=int, default=256, help="the number of tokens per row")
    try:
        options = parser.parse_args(argv)
        if not (options.model and options.output):
            raise UserError("--model=MODEL and --output=DIR are both required")
        name, _, rest = options.scheme.partition(":")
        group = {"name": name, **config_schema.parse_argument(rest)}
        about = {name: getattr(options, name) for name in ("split", "template", "seq_len")}
        text = data.DataConfig(source=options.data, **about) if options.data else None
        sizes = {"dtype": options.dtype, "rows": options.rows}
        print(quantization.write_quantized(options.model, group, options.output, text=text, **sizes))
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
