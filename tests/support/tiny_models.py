"""Tiny decoders of every kind, with parameters far from their initial values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core import tree
from lowrank.models import DecoderConfig, EncoderConfig, build_model, init_cache, kv_cache

V, T = 43, 12
SIZES = {"vocab_size": V, "max_positions": 32, "width": 16, "heads": 4, "hidden": 24}

LLAMA = {"layers": 2, "kv_heads": 2, "head_dim": 6}
WINDOWED = {**LLAMA, "window": 4, "qkv_bias": True, "tied": True}
GPT2 = {
    **LLAMA,
    "kv_heads": 4,
    "norm": "layer",
    "fused_qkv": True,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "gated": False,
    "activation": "gelu_tanh",
    "learned_positions": True,
}
GEMMA = {
    **LLAMA,
    "layers": 3,
    "tied": True,
    "norm_offset": 1.0,
    "post_norms": True,
    "qk_norm": True,
    "activation": "gelu_tanh",
    "window": 4,
    "local_layers": (True, False, True),
    "local_rope_theta": 100.0,
    "embed_scale": 4.0,
    "attn_scale": 0.2,
    "attn_logit_softcap": 3.0,
    "final_logit_softcap": 5.0,
}
MOE = {**LLAMA, "experts": 4, "experts_per_token": 2, "expert_hidden": 10, "shared_hidden": 12}
DECODERS = {"llama": LLAMA, "windowed": WINDOWED, "gpt2": GPT2, "gemma": GEMMA, "moe": MOE}


def decoder(kind, **options):
    """`(model, params)`."""
    return _random(build_model(DecoderConfig(**{**SIZES, "remat": "none", **DECODERS[kind], **options})))


def encoder(**options):
    """`(model, params)`."""
    return _random(build_model(EncoderConfig(**{**SIZES, "layers": 2, "remat": "none", **options})))


def _random(model):
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def leaf(name, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return jax.device_put(noise * 1.5 * x.shape[-2] ** -0.5 if name.endswith("kernel") else 1 + 0.5 * noise)

    return model, tree.map_named(leaf, like)


def normal(seed, *shape):
    """Float32 of the normal distribution, drawn by NumPy: no program is compiled."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(rows, length=T, seed=0):
    """Token ids int32 `[rows, length]`."""
    return np.random.default_rng(seed).integers(1, V, (rows, length)).astype(np.int32)


def run(model, params, *args, method="features", **kwargs):
    """`method` of the model, compiled once for each shape of its arguments."""
    return _apply(model, method, params, args, kwargs)


def run_in_parts(model, params, ids, lengths, parts):
    """The features of each row's tokens after its first `lengths`, in parts of these sizes, with a cache.

    The rows are padded on the right, and each has its own place in the cache.
    """
    lengths, virtual = np.asarray(lengths, np.int32), model.config.num_virtual_tokens
    _, entries = run(model, params, ids[:, : max(lengths)], method="prefill")
    cache = init_cache(model.config, len(ids) + 1, virtual + ids.shape[1])
    rows = np.arange(len(ids), dtype=np.int32) + 1
    cache = jax.jit(kv_cache.insert_rows)(cache, entries, rows, lengths + virtual)
    out, none = [], np.zeros(1, np.int32)
    for at, size in zip(np.cumsum([0, *parts]), parts, strict=False):
        columns = lengths[:, None] + at + np.arange(size)
        new = np.concatenate([none[:, None].repeat(size, 1), np.take_along_axis(ids, columns, 1)])
        h, cache = run(model, params, new, cache, method="extend")
        out.append(h[1:])
    return np.concatenate(out, axis=1)


def next_features(features, lengths, count):
    """The `count` features of each row `[B, T, D]` after its first `lengths`."""
    columns = np.asarray(lengths)[:, None] + np.arange(count)
    return np.take_along_axis(np.asarray(features), columns[..., None], axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method, params, args, kwargs):
    return model.apply({"params": params}, *args, **kwargs, method=method)


def sight(model, params, segments=None):
    """`[T, T]` bool: whether the feature of token i depends on token j, told by a derivative."""
    ids = np.arange(T, dtype=np.int32)[None]
    # in a random direction: what a layer sees of a token is rarely orthogonal to it
    directions = np.random.default_rng(1).standard_normal((T, 1, params["embed"]["embedding"].shape[1]))

    def features(embeddings_TxD):
        table = params["embed"]["embedding"].at[:T].set(embeddings_TxD)
        swapped = {**params, "embed": {**params["embed"], "embedding": table}}
        return model.apply({"params": swapped}, ids, segments=segments, method="features")[0]

    @jax.jit
    def derivatives(embeddings_TxD):
        moves_TxTxD = jnp.eye(T)[:, :, None] * jnp.asarray(directions, jnp.float32)
        return jax.vmap(lambda m: jax.jvp(features, (embeddings_TxD,), (m,))[1])(moves_TxTxD)

    depends = derivatives(params["embed"]["embedding"][:T])  # [from, to, D]
    return np.asarray(jnp.any(depends != 0, axis=-1)).T
