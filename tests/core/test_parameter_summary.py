"""The table says what every rule matched, in counts that an independent sum confirms."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank import methods
from lowrank.core import weight
from lowrank.core.parameter_summary import count_parameters, rule_table
from tests.support.close import assert_close


def params():
    stack = {k: {"kernel": jnp.ones((3, 16, 16)), "bias": jnp.ones((3, 16))} for k in ("q", "k", "v")}
    top = {"q": {"kernel": jnp.ones((2, 16, 16), jnp.bfloat16), "bias": jnp.ones((2, 16))}}
    return {"embed": {"embedding": jnp.ones((100, 16))}, "layers": {"attn": stack}, "top": {"attn": top}}


BASE = 100 * 16 + 3 * (3 * 16 * 16 + 3 * 16) + (2 * 16 * 16 + 2 * 16)
ADAPTERS = 2 * (3 * 2 * 16 * 4) + 2 * 2 * 16 * 4  # rank 4 on q and v of three layers and on q of two


def attached(**group):
    """The rules, shapes and mask of a method on `params`: shapes are all that counting needs."""
    method = methods.build_method(group)
    tree = jax.eval_shape(lambda: methods.attach(method, params(), jax.random.key(0)))
    return methods.matches(method, params()), tree, weight.declared_mask(tree, method.trainable)


def rows(table):
    return [line.split() for line in table.split("\n\n")[0].splitlines()[2:]]


def test_lora_counts_its_factors_and_the_kernels_they_stand_on():
    rules, tree, mask = attached(name="lora", rank=4, bias="all")
    table = rule_table(rules, tree, mask)
    kernels = 2 * 3 * 256 + 2 * 256
    assert table.splitlines()[0].split() == ["rule", "makes", "leaves", "layers", "parameters", "trained"]
    assert rows(table) == [
        [".*attn/(q|v|qkv)/kernel", "LoRA", "3", "5", f"{kernels + ADAPTERS:,}", f"{ADAPTERS:,}"],
        ["(.*/)?bias", "train", "4", "5", "176", "176"],
    ]
    assert f"trained: {ADAPTERS + 176:,} of {BASE + ADAPTERS:,} parameters (" in table


def test_totals_count_scales_and_caches_as_bytes_only():
    _, tree, mask = attached(name="dora", rank=4)
    sums = count_parameters(tree, mask)
    trained = ADAPTERS + 16 * (3 + 3 + 2)  # and a magnitude for each output
    assert sums["trained_params"] == trained
    assert sums["total_params"] == BASE + trained
    assert_close(sums["trained_percent"], 100 * trained / (BASE + trained))
    assert sums["trained_bytes"] == 4 * trained
    assert sums["total_bytes"] == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_padded_ranks_count_as_stored():
    _, tree, mask = attached(name="lora", rank=2, target="layers/attn/q/kernel", rank_pattern={"layers/1/.*": 4})
    assert count_parameters(tree, mask)["trained_params"] == 3 * 2 * 16 * 4


def test_training_everything_is_a_hundred_percent():
    rules, tree, mask = attached(name="full")
    sums = count_parameters(tree, mask)
    assert (sums["trained_params"], sums["total_params"], sums["trained_percent"]) == (BASE, BASE, 100.0)
    assert rows(rule_table(rules, tree, mask)) == [[".*", "train", "9", "5", f"{BASE:,}", f"{BASE:,}"]]


def test_a_rule_without_layers_has_none():
    method = methods.Method(trainable=("embed/.*",))
    mask = weight.declared_mask(params(), method.trainable)
    assert rows(rule_table(methods.matches(method, params()), params(), mask)) == [
        ["embed/.*", "train", "1", "0", "1,600", "1,600"]
    ]


@weight.form
class Codes(weight.Weight):
    codes: jax.Array = weight.frozen()
    absmax: jax.Array = weight.frozen()

    @property
    def shape(self):
        return self.codes.shape

    @property
    def dtype(self):
        return self.absmax.dtype


def test_forms_that_wrap_forms_are_spelt_out_and_codes_take_half_a_byte():
    rules, tree, mask = attached(name="lora", rank=4, target="layers/attn/q/kernel")
    lora = tree["layers"]["attn"]["q"]["kernel"]
    codes = Codes(codes=jnp.ones((3, 16, 16), jnp.int4), absmax=jnp.ones((3, 1, 16)))
    tree = {"layers": {"attn": {"q": {"kernel": dataclasses.replace(lora, base=codes)}}}}
    mask = weight.declared_mask(tree)
    (row,) = rows(rule_table(rules, tree, mask))
    assert row[1] == "LoRA(Codes)"
    assert count_parameters(tree, mask)["total_params"] == 3 * 256 + 3 * 2 * 16 * 4
    assert count_parameters(tree, mask)["total_bytes"] == 3 * 128 + 3 * 16 * 4 + 3 * 2 * 16 * 4 * 4 + 3 * 4
