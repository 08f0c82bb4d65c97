"""What every command does: bad flags and bad input are one line on stderr and exit code 2, and libraries keep quiet."""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from lowrank.core.errors import UserError


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parser for `app.run`. Logs warnings only, unless --verbosity asks for more: Orbax tells every step."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag")
    except (flags.Error, UserError) as e:
        return fail(e)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def fail(error: Exception) -> Any:
    """One line on stderr, and exit code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
