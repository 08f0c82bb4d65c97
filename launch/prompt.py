"""Reads a learned prompt: `python -m launch.prompt (--workdir=RUN | --adapter=DIR [--base=MODEL]) [--top=5]`.

The command prints the vocabulary's nearest tokens to each virtual token. Bad input is one line on stderr and exit
code 2.
"""

from collections.abc import Sequence

from absl import app, flags

from launch import adapters, command
from lowrank.adapters import nearest_tokens
from lowrank.core.errors import UserError

_TOP = flags.DEFINE_integer("top", 5, "The number of nearest tokens per virtual token.")


def main(argv: Sequence[str]) -> None:
    """Prints the table that the flags describe."""
    del argv
    try:
        model = adapters.adapted()
        print(nearest_tokens.table(model.params, model.tokenizer, _TOP.value))
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
