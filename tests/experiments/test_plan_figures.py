"""The literature's figures from shapes, and what numbers become in each format."""

import json

import pytest

from experiments.plan import literature, number_formats
from launch import preflight as command
from lowrank.core.errors import UserError
from tests.support.close import assert_close

PRINTED = {  # what -> (printed, ours)
    "13B weights, float32": (52, 52.06),
    "13B weights, 16 bits": (26, 26.03),
    "13B weights, 8 bits": (13, 13.02),
    "13B weights, 4 bits": (6.5, 6.508),
    "13B weights, int8 base": (13, 13.35),
    "13B weights, nf4 base": (6.5, 7.201),
    "13B inference over weights": (1.2, 1.129),
    "7B full, weights": (14, 13.48),
    "7B full, gradients and Adam": (42, 40.43),
    "13B full, gradients and Adam": (78, 78.10),
    "13B, 1B trained, gradients and Adam": (6, 5.710),
    "65B full, 16 bits": (780, 783.4),
    "Llama-2-13B, LoRA 2 on q, k, v, o, 16 bits": (6.55, 6.5536),
    "GPT-3, LoRA 2 on q, k, v, o, 16 bits": (37.7, 37.7487),
    "100 copies of a 4096 x 4096 kernel": (1680, 1677.7),
    "one and 100 adapters of rank 8": (23.3, 23.331),
    "65B QLoRA, moments on the host": (48, 42.87),
    "65B QLoRA, moments on the device": (48, 48.36),
}
DIFFER = {"13B weights, nf4 base", "13B inference over weights", "65B QLoRA, moments on the device"}


@pytest.fixture(scope="module")
def table():
    return literature.rows()


def test_every_printed_figure_is_beside_ours(table):
    assert {r["what"]: r["said"] for r in table} == {what: said for what, (said, _) in PRINTED.items()}
    for r in table:
        assert_close(r["ours"], PRINTED[r["what"]][1], relative=2e-3, name=r["what"])


def test_what_differs_says_so_and_nothing_else_does(table):
    assert {r["what"] for r in table if not r["agrees"]} == DIFFER
    assert all(r["note"] for r in table if not r["agrees"])
    lines = literature.text(table).splitlines()
    assert len(lines) == len(table) + 1
    assert sum("differs" in line for line in lines) == len(DIFFER)


def test_the_weights_are_parameters_times_bits(table):
    parameters = 2 * 32000 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    ours = {r["what"]: r["ours"] for r in table}
    assert_close(ours["13B weights, 4 bits"], parameters / 2 / 1e9)
    kernels = parameters - 2 * 32000 * 5120 - 40 * 2 * 5120 - 5120
    rest, double = parameters - kernels, 4 + 8 / 64 + 32 / 64 / 256  # bits of NF4, double quantization
    assert_close(ours["13B weights, nf4 base"], (kernels * double / 8 + 2 * rest) / 1e9)


def _becomes(*words):
    return {(r["value"], r["format"]): r["becomes"] for r in number_formats.rows(words)}


def test_a_number_in_every_float():
    found = _becomes("1234.56789")
    assert found[1234.56789, "float16"] == 1235.0
    assert found[1234.56789, "bfloat16"] == 1232.0
    assert found[1234.56789, "float8_e5m2"] == 1280.0
    assert_close(found[1234.56789, "float32"], 1234.56789, relative=2e-7)
    assert found[1234.56789, "float8_e4m3"] != found[1234.56789, "float8_e4m3"]  # nan: 448 is its largest


def test_the_worked_examples():
    found = {r["format"]: r for r in number_formats.rows(()) if "code" in r}
    assert {name: r["code"] for name, r in found.items()} == {"int8": -116, "int4": -7, "int2": -1}
    assert_close(found["int8"]["becomes"], -0.909804)
    assert_close(found["int2"]["becomes"], -0.666667)
    assert number_formats.worked("int2", 2, -5.0, 2 / 3)["code"] == -2  # the smallest that it has


def test_numbers_given_together_share_a_scale():
    found = _becomes("-0.91", "0.3", "0.02", "0.5")
    assert_close(found[0.3, "int8"], round(0.3 * 127 / 0.91) * 0.91 / 127)
    assert found[0.3, "int2"] == 0
    assert_close(found[0.5, "int2"], 0.91)
    assert_close(found[0.5, "nf4"], 0.5626170039 * 0.91)
    assert_close(found[0.5, "ternary"], (0.91 + 0.3 + 0.02 + 0.5) / 4)


def test_what_is_no_number_is_refused():
    for word in ("many", "nan", "inf"):
        with pytest.raises(UserError, match=f"formats takes finite numbers, .* and not '{word}'"):
            number_formats.rows([word])


def test_the_command_prints_them(capsys):
    assert command.main(["formats", "1234.56789", "-0.91"]) == 0
    assert "1232" in capsys.readouterr().out
    assert command.main(["formats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["value"] == 1234.56789
