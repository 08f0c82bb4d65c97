"""Writes a base in codes: `python -m launch.quantize --model=smollm2-135m --scheme=nf4:double=true --out=DIR`.

Schemes are those of `model.quantize`. The folder is like one of Hugging Face, with codes in place of kernels
(`lowrank.pretrained.kept`): `model.name=DIR` in a config, and every method on top.
Bad input is one line on stderr and exit code 2.
"""

from collections.abc import Sequence

from absl import app, flags

from launch import adapters
from lowrank import ptq, settings
from lowrank.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "The model: a name, a folder, a .gguf file, or org/name of the hub.")
_SCHEME = flags.DEFINE_string("scheme", "nf4", "NAME or NAME:KEY=VALUE,...")
_OUT = flags.DEFINE_string("out", None, "Where the base goes: an empty folder, or a new one.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "What tensors without codes are stored in: float32 or bfloat16.")


def main(argv: Sequence[str]) -> None:
    """Quantises as the flags describe."""
    del argv
    try:
        if not (_MODEL.value and _OUT.value):
            raise UserError("--model=MODEL and --out=DIR are both required")
        name, _, options = _SCHEME.value.partition(":")
        group = {"name": name, **settings.parse(options)}
        print(ptq.write(_MODEL.value, group, _OUT.value, dtype=_DTYPE.value))
    except UserError as e:
        adapters.fail(e)


if __name__ == "__main__":
    app.run(main, flags_parser=adapters.parse)
