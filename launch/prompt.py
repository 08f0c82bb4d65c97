"""Reads a learned prompt: `python -m launch.prompt (--workdir=RUN | --adapter=DIR [--base=MODEL]) [--top=5]`.

The command prints the vocabulary's nearest tokens to each virtual token. Bad input is one line on stderr and exit
code 2.
"""

import sys
from collections.abc import Sequence

from launch import adapters, command
from lowrank.adapters import nearest_tokens
from lowrank.core.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Prints the table that the arguments describe."""
    parser = command.Parser("launch.prompt", __doc__)
    adapters.add_flags(parser)
    parser.add_argument("--top", type=int, default=5, help="the number of nearest tokens per virtual token")
    try:
        options = parser.parse_args(argv)
        model = adapters.adapted(options)
        print(nearest_tokens.table(model.params, model.tokenizer, options.top))
    except UserError as e:
        command.fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
