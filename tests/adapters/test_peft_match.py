"""The modules that a config of PEFT means, by the rules of PEFT."""

import pytest

from lowrank.adapters.peft import match

PATHS = [f"model.layers.{i}.{m}" for i in range(12) for m in ("attn.q", "attn.c_proj", "mlp.c_proj")] + ["lm_head"]


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        ({"target_modules": ["q"]}, lambda p: p.endswith(".q")),
        ({"target_modules": ["mlp.c_proj"]}, lambda p: p.endswith("mlp.c_proj")),
        ({"target_modules": r".*\.1\.attn\.(q|c_proj)"}, lambda p: p.startswith("model.layers.1.attn")),
        ({"target_modules": "all-linear"}, lambda p: p != "lm_head"),
        (
            {"target_modules": ["q"], "layers_to_transform": [1, 11]},
            lambda p: p.split(".")[2:] in (["1", "attn", "q"], ["11", "attn", "q"]),
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"},
            lambda p: p == "model.layers.1.attn.q",
        ),
        ({"target_modules": ["c_proj"], "exclude_modules": ["attn.c_proj"]}, lambda p: p.endswith("mlp.c_proj")),
        ({"target_modules": ["q", "lm_head"], "modules_to_save": ["lm_head"]}, lambda p: p.endswith(".q")),
    ],
)
def test_targets_are_chosen_by_the_rules_of_peft(config, chosen):
    assert match.find_targets(config, PATHS, heads=["lm_head"]) == [p for p in PATHS if chosen(p)]


def test_a_pattern_matches_the_end_of_a_path_and_the_first_match_wins():
    patterns = {"layers.1.attn.q": 2, "attn.q": 3, "q": 4}
    values = [
        match.pattern_value(patterns, f"model.layers.{p}", 8) for p in ("1.attn.q", "11.attn.q", "0.mlp.q", "0.mlp.xq")
    ]
    assert values == [2, 3, 4, 8]


@pytest.mark.parametrize("chosen", [PATHS[:1], PATHS[1::3], PATHS[2::3], PATHS[3:9], ["lm_head"]])
def test_short_names_choose_exactly_what_they_were_made_for(chosen):
    names = match.shortest_ends(chosen, [p for p in PATHS if p not in chosen])
    assert [p for p in PATHS if match.is_named(names, p)] == chosen
