"""Trained parameters, on abstract shapes, are what the formulas of the papers give."""

import json

import pytest

from experiments.counts import __main__ as study
from experiments.counts.papers import CASES
from experiments.plan.paper_models import MODELS

# The papers' arithmetic: layers * matrices * rank * (in + out), and so on.
EXPECTED = (
    96 * 4 * 2 * (12288 + 12288),
    96 * 2 * 1 * (12288 + 12288),
    12 * 2 * 8 * (768 + 768),
    12 * (2 * 768 * 16 + 16 + 768),
    12 * (2 * 768 * 48 + 48 + 768),
    12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768,
    24 * 2 * 4 * (1024 + 1024),
    36 * 2 * 4 * (1280 + 1280),
    32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008)),
    32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008)) + 32 * (3 * 4096 + 11008 + 4096),
    40 * 4 * 2 * (5120 + 5120),
    40 * 2 * 2 * (5120 + 5120),
    8 * (512 + 64),
)
PRINTED = (18_874_368, 4_718_592, 294_912, 304_320, 894_528, 102_144, 393_216, 737_280)
PRINTED += (56_098_816, 56_975_360, 3_276_800, 1_638_400, 4608)


@pytest.mark.parametrize(("case", "formula", "number"), list(zip(CASES, EXPECTED, PRINTED, strict=True)))
def test_counts_are_those_of_the_papers(case, formula, number):
    assert study.count(MODELS[case.model], case.method)["trained_params"] == formula == number


def test_the_percentages_of_dora_are_those_of_the_paper():
    shares = [study.count(MODELS["LLaMA-7B"], c.method)["trained_percent"] for c in CASES if c.model == "LLaMA-7B"]
    assert [f"{share:.2f}" for share in shares] == ["0.83", "0.84"]


def test_the_committed_table_is_what_the_command_writes():
    assert json.loads(study.RESULTS.read_text()) == json.loads(json.dumps(study.rows()))
