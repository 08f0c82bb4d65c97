"""The models that a recipe names."""

import re
from typing import NamedTuple

from lowrank.core.errors import UserError


class ModelSpec(NamedTuple):
    """A model of a recipe: `PATH[@REVISION][+ADAPTER]`."""

    path: str
    revision: str | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.path}{revision}{f'+{self.adapter}' if self.adapter else ''}"


def parse_model(text: str) -> ModelSpec:
    """The model that a text names. Raises UserError for another form."""
    match = re.fullmatch(r"([^@+]+)(?:@([^+]+))?(?:\+(.+))?", text)
    if not match:
        raise UserError(f"model {text!r} is not of the form PATH[@REVISION][+ADAPTER]")
    return ModelSpec(match[1], match[2], match[3])
