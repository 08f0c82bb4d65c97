import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.models import build_model
from lowrank.pretrained.families import FAMILIES, family_of

SIZES = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 43, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
DISTILBERT = {"vocab_size": 43, "max_position_embeddings": 32, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24}
DEBERTA = {"relative_attention": True, "position_biased_input": False, "share_att_key": True, "position_buckets": 6}
DEBERTA |= {**SIZES, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
OTHERS = {"gpt2": GPT2, "distilbert": DISTILBERT, "deberta-v2": DEBERTA, "gpt_neox": {**SIZES, "rotary_pct": 0.5}}
OPTIONS = [{}, {"top_layers": 2}, {"top_layers": 3, "num_labels": 4}]


def spec(name, **options):
    return {"model_type": name, **OTHERS.get(name, SIZES), **options}


def leaves(config):
    like = jax.eval_shape(build_model(config).init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    return dict(tree.named_leaves(like))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_covers_every_leaf_once_and_every_layer_once(name, options):
    config = dataclasses.replace(FAMILIES[name].config(spec(name)), **options)
    tensors = FAMILIES[name].tensors(config)
    shapes = leaves(config)
    assert sorted(t.leaf for t in tensors) == sorted(shapes)
    hf = [n for t in tensors for n in t.names]
    assert len(hf) == len(set(hf))
    assert all(shapes[t.leaf].shape[0] == t.count for t in tensors if t.count)
    assert all(shapes[t.leaf].shape[: len(t.stack)] == t.stack for t in tensors)
    assert all(len(t.names) == len(t.places) for t in tensors)
    norms = sorted(n for t in tensors if re.fullmatch(r"(layers|top)/attn/o/kernel", t.leaf) for n in t.names)
    assert [re.search(r"\.(\d)\.", n)[1] for n in norms] == ["0", "1", "2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_written_and_read_again_is_the_same(name):
    family = FAMILIES[name]
    config = family.config(spec(name, sliding_window=8))
    assert family_of(family.hf_config(config)) is family
    assert family.config(family.hf_config(config)) == config


def test_rope_is_read_from_old_and_new_configs_alike():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = FAMILIES["llama"].config
    new = config(spec("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}))
    old = config(spec("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}))
    older = config(spec("llama", rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}))
    assert new == old == older
    assert (new.rope_theta, new.rope_scaling.factor) == (5e5, 8.0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_rope_theta_is_for_rope_parameters_that_lack_it(name):
    config = FAMILIES[name].config
    beside = config(spec(name, rope_theta=5e5, rope_parameters={"rope_type": "default"}))
    inside = config(spec(name, rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert (beside.rope_theta, inside.rope_theta) == (5e5, 5e5)


def test_rope_scaling_replaces_rope_parameters():
    old, new = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 5e5}
    for name in ("llama", "mixtral"):
        config = FAMILIES[name].config(spec(name, rope_scaling=old, rope_parameters=new, rope_theta=5e5))
        assert (config.rope_theta, config.rope_scaling.factor) == (5e5, 4.0)
    with pytest.raises(UserError, match=r"has the rope_theta 500000.0 in rope_parameters, .* and 10000.0 for"):
        FAMILIES["llama"].config(spec("llama", rope_scaling=old, rope_parameters=new))


SCALINGS = [
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 8},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0], "factor": 4.0},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaling_written_and_read_again_is_the_same(scaling):
    family = FAMILIES["llama"]
    config = family.config(spec("llama", rope_scaling=scaling))
    assert family.config(family.hf_config(config)) == config
    written = family.hf_config(config)["rope_scaling"]
    assert {k: written[k] for k in scaling} == scaling


def test_the_original_context_and_the_factor_are_found_where_transformers_finds_them():
    config, whole = FAMILIES["llama"].config, SIZES["max_position_embeddings"]
    inside = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": whole // 4}
    found = config(spec("llama", rope_parameters=inside)).rope_scaling
    assert (found.original_positions, found.factor) == (whole // 4, 4.0)
    beside = spec("llama", rope_parameters=inside, original_max_position_embeddings=whole // 2)
    assert config(beside).rope_scaling.original_positions == whole // 2
    neither = config(spec("llama", rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    assert neither.rope_scaling.original_positions == whole
    phi = spec("phi3", rope_scaling={"type": "su", "short_factor": [1.0, 1.0], "long_factor": [1.0, 2.0]})
    assert FAMILIES["phi3"].config(phi).rope_scaling.original_positions == 4096


def test_gemma_3_fills_in_the_ropes_of_both_kinds():
    kinds = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    thetas = {"rope_theta": 3e6, "rope_local_base_freq": 2e4}
    config = FAMILIES["gemma3_text"].config(spec("gemma3_text", rope_parameters=kinds, **thetas))
    assert (config.rope_theta, config.local_rope_theta) == (3e6, 2e4)


def test_gemma_3_has_five_local_layers_to_a_global_one_and_a_rope_for_each_kind():
    config = FAMILIES["gemma3_text"].config(spec("gemma3_text", num_hidden_layers=7, sliding_window=8))
    assert config.local_layers == (True, True, True, True, True, False, True)
    assert (config.window, config.rope_theta, config.local_rope_theta) == (8, 1e6, 1e4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (spec("lama"), "unknown model type 'lama' .did you mean 'llama'"),
        (SIZES, "config.json has no 'model_type'"),
        ({k: v for k, v in spec("llama").items() if k != "hidden_size"}, "config.json has no 'hidden_size'"),
        (spec("llama", rope_scaling={"rope_type": "yran", "factor": 4.0}), "unknown rope scaling 'yran' .did you mean"),
        (spec("llama", rope_scaling={"rope_type": "yarn"}), "rope scaling 'yarn' has no 'factor'"),
        (spec("llama", rope_scaling={"type": "dynamic"}), "rope scaling 'dynamic' has no 'factor'"),
        (spec("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}), "'llama3' has no 'low_freq_factor'"),
        (spec("phi3", rope_scaling={"type": "su", "short_factor": [1.0]}), "'longrope' has no 'long_factor'"),
        (spec("llama", rope_scaling={"rope_type": "linear"}), "rope scaling 'linear' has no 'factor'"),
        (spec("qwen3", hidden_act="mish"), "unknown activation in config.json's 'hidden_act', 'mish'"),
        (spec("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True is not supported"),
        (spec("bert", position_embedding_type="relative_key"), "position_embedding_type='relative_key' is not"),
        (spec("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention=True is not supported"),
    ],
)
def test_what_a_config_lacks_or_we_do_not_compute_is_named(config, message):
    with pytest.raises(UserError, match=message):
        family_of(config).config(config)
