"""Griffe extension: a comment at a field or constant, or right above it, is its documentation."""

import io
import tokenize
from typing import Any

import griffe


class Comments(griffe.Extension):
    """Gives attributes without a docstring the comments that stand beside them."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Reads the comment of `attr`, which griffe has just made of `node`."""
        del node, kwargs
        if attr.docstring or attr.lineno is None:
            return
        text = " ".join([*_above(attr), *_beside(attr)])
        if text and not text.startswith("noqa"):
            sentence = f"{text[0].upper()}{text[1:]}" if text[:2].isalpha() else text  # not a formula
            attr.docstring = griffe.Docstring(f"{sentence}.", parent=attr, lineno=attr.lineno)


def _lines(attr: griffe.Attribute) -> list[str]:
    return attr.module.lines_collection[attr.filepath]


def _above(attr: griffe.Attribute) -> list[str]:
    """The lines of comments that end right above the field."""
    found, lines, at = [], _lines(attr), attr.lineno - 2
    while lines[at].lstrip().startswith("#"):
        found.insert(0, lines[at].lstrip("# "))
        at -= 1
    return found


def _beside(attr: griffe.Attribute) -> list[str]:
    """The comments in the lines of the field."""
    source = "\n".join(_lines(attr)[attr.lineno - 1 : attr.endlineno])
    tokens = tokenize.generate_tokens(io.StringIO(source.strip()).readline)
    return [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
