import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from tests.support.close import assert_close
from tests.support.tiny_models import T, encoder, run, sight, tokens

PACKED = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)


def close(a, b):
    assert_close(a, b, relative=4e-5)


def test_a_token_depends_on_all_of_its_segment_and_nothing_else():
    model, params = encoder()
    assert np.all(sight(model, params))
    assert np.array_equal(sight(model, params, PACKED), PACKED[0][:, None] == PACKED[0][None])


def test_packed_rows_equal_rows_of_their_own():
    model, params = encoder(position_offset=2)
    ids = tokens(1)
    packed = run(model, params, ids, PACKED)[0]
    close(packed[:5], run(model, params, ids[:, :5])[0])
    close(packed[5:9], run(model, params, ids[:, 5:9])[0])


@pytest.mark.parametrize(
    "options",
    [{"pooling": "cls", "dense_head": True}, {"pooling": "mean", "num_prompt": 3}, {"pooling": "pooler"}],
    ids=str,
)
def test_label_logits_do_not_depend_on_padding(options):
    model, params = encoder(num_labels=3, **options)
    ids, pad = tokens(2, 8), np.full((2, T - 8), 7, np.int32)
    ones = np.ones_like(ids)
    plain = run(model, params, ids, method="__call__")
    for order in (1, -1):
        row, segments = np.hstack([ids, pad][::order]), np.hstack([ones, 0 * pad][::order])
        close(run(model, params, row, segments, method="__call__"), plain)
    assert plain.shape == (2, 3)


def test_pooling_is_what_its_name_says():
    ids, segments = tokens(1), (PACKED == 1).astype(np.int32)
    model, params = encoder(pooling="mean")
    h = run(model, params, ids, segments)[0, :5]
    close(run(model, params, ids, segments, method="pooled")[0], h.mean(0))
    close(run(encoder()[0], params, ids, segments, method="pooled")[0], h[0])
    model, params = encoder(pooling="pooler")
    want = np.tanh(run(model, params, ids, segments)[0, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    close(run(model, params, ids, segments, method="pooled")[0], want)


def test_token_types_default_to_the_first():
    model, params = encoder()
    ids = tokens(1)
    close(run(model, params, ids, None, np.zeros_like(ids)), run(model, params, ids))
    assert np.abs(run(model, params, ids, None, np.ones_like(ids)) - run(model, params, ids)).max() > 0.1


def test_top_layers_and_remat_change_neither_features_nor_gradient():
    model, params = encoder()
    split = {k: v for k, v in params.items() if k != "layers"}
    split["layers"], split["top"] = (jax.tree.map(lambda x, i=i: x[i : i + 1], params["layers"]) for i in (0, 1))

    def loss(model):
        return lambda p: jnp.sum(model.apply({"params": p}, tokens(1)) ** 3)

    plain = jax.jit(jax.value_and_grad(loss(model)))(params)
    again = jax.jit(jax.value_and_grad(loss(encoder(top_layers=1, remat="full")[0])))(split)
    close(again[0], plain[0])
    close(again[1]["top"]["attn"]["q"]["kernel"][0], plain[1]["layers"]["attn"]["q"]["kernel"][1])


def test_impossible_input_names_the_culprit():
    with pytest.raises(UserError, match="unknown pooling 'max'"):
        encoder(pooling="max")
    model, params = encoder(num_prompt=3)
    with pytest.raises(UserError, match="30 tokens and 3 virtual tokens is longer than the model's 32 positions"):
        model.apply({"params": params}, tokens(1, 30))
