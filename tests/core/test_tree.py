import jax.numpy as jnp
import pytest

from lowrank.core import tree
from lowrank.core.errors import UserError

TREE = {"layers": {"q": {"kernel": jnp.zeros(2), "bias": jnp.ones(1)}}, "head": {"kernel": jnp.ones(3)}}


def test_names_are_slash_joined_paths_in_leaf_order():
    assert tree.leaf_names(TREE) == ["head/kernel", "layers/q/bias", "layers/q/kernel"]


def test_a_pattern_matches_whole_names():
    assert tree.match_names(r".*/kernel", tree.leaf_names(TREE)) == ["head/kernel", "layers/q/kernel"]
    with pytest.raises(UserError, match=r"target 'layers/q/kernal' matches no leaf \(did .*'layers/q/kernel'\?\)"):
        tree.match_names("layers/q/kernal", tree.leaf_names(TREE), "target")


def test_a_broken_regex_is_named():
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        tree.match_names("(", ["a"])


def test_the_first_rule_wins_and_coverage_is_required():
    rules = [(r"head/.*", 1), (r".*kernel", 2)]
    assert tree.first_match(rules, "head/kernel") == 1
    assert tree.first_match(rules, "layers/q/kernel") == 2
    with pytest.raises(UserError, match="no rule covers leaf 'layers/q/bias'"):
        tree.first_match(rules, "layers/q/bias")


def test_split_then_join_is_the_identity_and_the_parts_are_disjoint():
    chosen, rest = tree.split(TREE, tree.pattern_mask(TREE, [r"head/.*"]))
    assert tree.leaf_names(chosen) == ["head/kernel"]
    assert tree.leaf_names(rest) == ["layers/q/bias", "layers/q/kernel"]
    assert tree.join(chosen, rest) == TREE
