"""The texts of errors: one line each, in plain English, with counts and nouns that agree."""

import ast
import pathlib
import re

import pytest

from lowrank.core.errors import plural

ROOT = pathlib.Path(__file__).parents[1]
ERRORS = ("UserError", "Diverged", "InUse")
VALUE = "\0"  # stands for an interpolated value
COUNTED = (
    "batches|blocks|classes|devices|examples|experts|files|groups|hosts|inputs|kernels|labels|layers|levels|"
    "modules|outputs|positions|processes|records|rows|shards|slots|steps|tensors|texts|tokens|values|weights"
)
TOPS = ("lowrank", "launch", "configs", "experiments")


def template(node: ast.expr, locals_: dict[str, ast.expr]) -> str:
    """The text of an expression, with VALUE for each value that it interpolates; "" if it is not a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, locals_) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return (template(node.value, locals_) if isinstance(node.value, ast.Name) else "") or VALUE
    if isinstance(node, ast.Name) and node.id in locals_:
        return template(locals_[node.id], {})
    return ""


def texts() -> list[tuple[str, str]]:
    """`(file:line, template)` of every error of the package and its commands."""
    found = []
    for path in sorted(
        path for top in ("lowrank", "launch", "configs", "experiments") for path in (ROOT / top).rglob("*.py")
    ):
        for function in [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]:
            nodes = list(ast.walk(function))
            assigned = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
            locals_ = {n.targets[0].id: n.value for n in assigned}
            calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ERRORS and n.args]
            found += [(f"{path.relative_to(ROOT)}:{n.lineno}", template(n.args[0], locals_)) for n in calls]
    return [(where, text) for where, text in dict.fromkeys(found) if text]


FORBIDDEN = {
    "says what is not there: 'is not a kernel', 'no checkpoint exists'": r"\b(is|are|was|were) no\b",
    "agrees with any count through core.errors.plural": rf"\0 (virtual |real |trained )?({COUNTED})\b|\(s\)|\b1 \w+s\b",
    "starts as the middle of a sentence, after `error: `": r"\A[A-Z][a-z]+ ",
    "ends without a period": r"\.\Z",
    "is one line": r"\n",
    "has 'per' between two units, not 'a'": rf"\b({COUNTED}) a (token|layer|row|leaf|weight|kernel|device|step|host)\b",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_every_text(rule):
    assert not [f"{where}: {text}" for where, text in texts() if re.search(FORBIDDEN[rule], text)]


def test_the_texts_are_found():
    assert len(texts()) > 250


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "token", "1 token"), (2, "token", "2 tokens"), (0, "class", "0 classes"), (3, "batch", "3 batches")],
)
def test_a_count_and_its_noun_agree(count, noun, text):
    assert plural(count, noun) == text
    assert plural(2, "entry") == "2 entries"
