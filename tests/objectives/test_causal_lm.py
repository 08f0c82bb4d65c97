"""The loss of language modeling where a mesh shards the tokens of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import sharding
from lowrank.objectives.causal_lm import language_loss, language_row_sums
from tests.support.close import assert_close

B, T, D, V = 4, 8, 5, 11


class Network:
    """The features of a token are a row of a table, and its logits a product."""

    @staticmethod
    def apply(variables, x, *unused, method):
        params = variables["params"]
        return params["table"][x] if method == "features" else x @ params["head"]


@pytest.mark.parametrize("row_sums", [False, True])
def test_chunks_of_the_loss_on_a_context_axis_add_up_to_the_loss_of_whole_rows(row_sums):
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(V, D)).astype(np.float32), "head": rng.normal(size=(D, V)).astype(np.float32)}
    batch = {name: rng.integers(0, V, (B, T)) for name in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = rng.uniform(size=(B, T)).astype(np.float32)

    def loss(params, batch, chunk):
        if not row_sums:
            return language_loss(Network, params, batch, chunk).total
        return jnp.sum(language_row_sums(Network, params, batch, chunk)[0] * jnp.arange(1.0, 1 + B))

    want = jax.value_and_grad(loss)(params, batch, 0)
    mesh = sharding.make_mesh(data=2, context=2, tensor=2)
    args = jax.device_put(params, sharding.replicated_sharding(mesh)), sharding.make_global_batch(batch, mesh, batch)
    with sharding.mesh_context(args):
        program = jax.jit(jax.value_and_grad(loss), static_argnums=2).lower(*args, 8).compile()
    assert_close(program(*args), want)
    assert "all-gather" not in program.as_text()  # each device computes the logits of its own tokens
