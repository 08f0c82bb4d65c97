"""Laws of strangers' templates: whatever one does, it ends in time, within memory, and harms no later rendering."""

import os

import pytest
from tokenizers import Regex, pre_tokenizers

from lowrank.core.errors import UserError
from lowrank.pretrained import template_process
from lowrank.pretrained.chat_template import render
from lowrank.pretrained.tokenizer import load_tokenizer
from tests.support import checkpoint_files as files

MESSAGES = [{"role": "user", "content": "héllo"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "does not end within 2 s"),
        (DOUBLED, "takes more than 1 GiB of memory"),
        ("{{ 'a' * 10**11 }}", "takes more than 1 GiB of memory"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_without_bounds_is_an_error(template, reason):
    with pytest.raises(UserError, match=f"cannot render these messages: .*{reason}"):
        render(template, MESSAGES)
    assert render("{{ messages[0].content }}", MESSAGES).text == "héllo"


def test_a_process_that_dies_is_an_error_and_starts_again():
    process = template_process.TemplateProcess()
    assert process.render("{{ x }}", {"x": 1}) == "1"
    os.kill(process._process.pid, 9)
    process._process.wait()
    assert process.render("{{ x }}", {"x": 2}) == "2"
    with pytest.raises(UserError, match="holds what is no JSON"):
        process.render("{{ x }}", {"x": object()})
    process.stop()


def test_a_regular_expression_without_end_is_an_error(tmp_path):
    files.write_tokenizer(tmp_path, 8)
    tokenizer = load_tokenizer(tmp_path, {})
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(UserError, match="most likely by a regular expression"):
        tokenizer.encode("a" * 40 + "b")
