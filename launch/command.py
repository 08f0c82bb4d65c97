"""The behavior that all commands share: exit codes, one line on stderr for bad input, and quiet libraries."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from lowrank.core.errors import Diverged, UserError
from lowrank.core.exit_codes import BAD_INPUT, DIVERGED


class Parser(argparse.ArgumentParser):
    """A parser of argparse whose errors are one line. `description` is printed as it is written."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which is printed as one line in place of the usage."""
        raise UserError(message)

    def parse_with_changes(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """`(options, [--config.a.b=c, ...])`. Raises UserError for an unknown flag."""
        changes = [word for word in argv if word.startswith("--config.")]
        return self.parse_args([word for word in argv if word not in changes]), changes


def parse(argv: Sequence[str]) -> list[str]:
    """The parser of absl for `app.run`. It logs warnings alone, as Orbax logs every step."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag")
    except (flags.Error, UserError) as e:
        return fail(e)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def fail(error: Exception) -> NoReturn:
    """Prints the error and exits with its code."""
    sys.exit(print_error(error))


def print_error(error: Exception) -> int:
    """Prints the error as one line on stderr; returns its exit code."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return DIVERGED if isinstance(error, Diverged) else BAD_INPUT
