"""Quantizes a base: `python -m launch.quantize --model=smollm2-135m --scheme=nf4:double=true --output=DIR`.

The schemes are those of `model.quantize`, and gptq and awq, which are calibrated by data:
`--scheme=gptq:bits=4,block=64 --data=jsonl:records.jsonl`. The output is a folder as Hugging Face writes it, with codes
in place of kernels (`lowrank.pretrained.quantized_checkpoint`). A config reads it by `model.name=DIR`, and every method
can be attached. Bad input is one line on stderr and exit code 2.
"""

from collections.abc import Sequence

from absl import app, flags

from launch import command
from lowrank import data, quantization
from lowrank.core import config_schema
from lowrank.core.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "The model: a name, a folder, a .gguf file, or org/name of the hub.")
_SCHEME = flags.DEFINE_string("scheme", "nf4", "NAME or NAME:KEY=VALUE,...")
_OUTPUT = flags.DEFINE_string("output", None, "Where the base goes: an empty folder, or a new one.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "The dtype of unquantized tensors: float32 or bfloat16.")
_DATA = flags.DEFINE_string("data", None, "The calibration data of gptq and awq: data.source of a config.")
_SPLIT = flags.DEFINE_string("split", "train", "Its split.")
_TEMPLATE = flags.DEFINE_string("template", "auto", "The template of a record: data.template of a config.")
_ROWS = flags.DEFINE_integer("rows", 64, "The number of rows that are read.")
_LENGTH = flags.DEFINE_integer("seq_len", 256, "The number of tokens per row.")


def main(argv: Sequence[str]) -> None:
    """Quantizes the base that the flags describe."""
    del argv
    try:
        if not (_MODEL.value and _OUTPUT.value):
            raise UserError("--model=MODEL and --output=DIR are both required")
        name, _, options = _SCHEME.value.partition(":")
        group = {"name": name, **config_schema.parse_argument(options)}
        about = {"source": _DATA.value, "split": _SPLIT.value, "template": _TEMPLATE.value, "seq_len": _LENGTH.value}
        text = data.DataConfig(**about) if _DATA.value else None
        model, out, options = _MODEL.value, _OUTPUT.value, {"dtype": _DTYPE.value, "rows": _ROWS.value}
        print(quantization.write_quantized(model, group, out, text=text, **options))
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
