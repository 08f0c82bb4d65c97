import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.kernels import cross_entropy
from lowrank.objectives import build_objective
from tests.support.close import assert_close

B, T, D, V = 2, 7, 5, 11


def _problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    h = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.uniform(keys[3], (B, T))
    body = jax.random.normal(keys[4], (D, D))
    return h, head, targets, weights, body


def _both(rows=4):
    """The plain sum and the chunked one as functions of (body, head)."""
    h, _, targets, weights, _ = _problem()

    def plain(body, head):
        return 3 * jnp.sum(cross_entropy.token_nll(h @ body @ head, targets) * weights)

    def chunked(body, head):
        return 3 * cross_entropy.chunked_nll(lambda x: x @ head, h @ body, targets, weights, rows)

    return plain, chunked


def test_token_nll_is_the_float64_definition():
    h, head, targets, _, _ = _problem()
    logits = np.asarray(h, np.float64) @ np.asarray(head, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    want = -np.log(np.take_along_axis(exp / exp.sum(-1, keepdims=True), np.asarray(targets)[..., None], -1)[..., 0])
    assert_close(cross_entropy.token_nll(h @ head, targets), want)


def test_token_nll_survives_large_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert cross_entropy.token_nll(logits, jnp.array([0]))[0] == 0
    assert cross_entropy.token_nll(logits, jnp.array([1]))[0] == 2e4


def test_token_nll_of_bfloat16_logits_is_float32():
    logits = jnp.ones((3, V), jnp.bfloat16)
    assert cross_entropy.token_nll(logits, jnp.zeros(3, jnp.int32)).dtype == jnp.float32
    assert_close(cross_entropy.token_nll(logits, jnp.zeros(3, jnp.int32)), np.log(V))


def _both_per_token(rows=4):
    """A sum of squares of the tokens' terms, so that each has its own slope, as functions of (body, head)."""
    h, _, targets, weights, _ = _problem()
    weights = weights.at[0, 2:5].set(0)  # of a row that ends up in other chunks than the other one
    scales = jnp.arange(1.0, 1 + B * T).reshape(B, T) - 9

    def plain(body, head):
        return jnp.sum(jnp.square(cross_entropy.token_nll(h @ body @ head, targets) * weights) * scales)

    def chunked(body, head):
        terms = cross_entropy.chunked_token_nll(lambda x: x @ head, h @ body, targets, weights, rows)
        return jnp.sum(jnp.square(terms) * scales)

    return plain, chunked


@pytest.mark.parametrize("both", [_both, _both_per_token])
@pytest.mark.parametrize("rows", [1, 4, 6, 14, 1000])
def test_chunked_equals_plain_in_value_and_gradients(rows, both):
    plain, chunked = both(rows)
    _, head, _, _, body = _problem()
    want, want_grads = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(body, head)
    got, got_grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(body, head)
    assert_close(got, want)
    assert_close(got_grads[0], want_grads[0])
    assert_close(got_grads[1], want_grads[1])
    assert_close(jax.jit(chunked)(body, head), want)


def test_positions_without_weight_cost_no_head():
    h, head, targets, _, _ = _problem()
    weights = jnp.array([[0, 1, 0, 0, 2, 0, 0], [0, 0, 0, 1, 0, 0, 0.5]])
    clean = jax.jit(jax.value_and_grad(lambda h: jnp.sum(cross_entropy.token_nll(h @ head, targets) * weights)))(h)
    poisoned = jnp.where(weights[..., None] > 0, h, jnp.nan)  # where the head looks at one of these, the sum is NaN

    def chunked(h):
        return cross_entropy.chunked_nll(lambda x: x @ head, h, targets, weights, 2 * B)

    assert_close(jax.jit(chunked)(poisoned), clean[0])
    value, gradient = jax.jit(jax.value_and_grad(chunked))(poisoned)
    assert_close(value, clean[0])
    assert_close(gradient, clean[1])
    assert jnp.isnan(cross_entropy.chunked_nll(lambda x: x @ head, poisoned, targets, weights, 3 * B))
    assert cross_entropy.chunked_nll(lambda x: x @ head, h, targets, 0 * weights, 4) == 0


def test_a_frozen_head_costs_no_gradient_of_its_own():
    _, chunked = _both()
    _, head, _, _, body = _problem()

    def matmuls(argnums):
        return str(jax.make_jaxpr(jax.grad(chunked, argnums))(body, head)).count("dot_general")

    assert matmuls((0, 1)) == matmuls(0) + 1


def test_tokens_with_a_frozen_head_cost_one_pass_over_the_logits():
    _, chunked = _both()
    _, chunked_tokens = _both_per_token()
    _, head, _, _, body = _problem()
    one, each = (str(jax.make_jaxpr(jax.grad(f))(body, head)).count("dot_general") for f in (chunked, chunked_tokens))
    assert each == one


def test_chunked_never_holds_all_logits():
    rows, length, width, vocab = 32, 1024, 8, 4096
    head = jnp.ones((width, vocab))
    targets, weights = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length))

    def temp(loss):
        return (
            jax.jit(jax.grad(loss)).lower(jnp.ones((1, length, width))).compile().memory_analysis().temp_size_in_bytes
        )

    chunked = temp(lambda h: cross_entropy.chunked_nll(lambda x: x @ head, h, targets, weights, rows))
    plain = temp(lambda h: jnp.sum(cross_entropy.token_nll(h @ head, targets) * weights))
    assert plain >= length * vocab * 4
    assert chunked <= 6 * rows * vocab * 4


@pytest.mark.parametrize("learned", [(0,), (0, 1)])
def test_a_head_sharded_over_a_mesh_gives_the_loss_and_gradients_of_one_device(learned):
    rows, length, width, vocab = 4, 32, 8, 64
    h, head = (jax.random.normal(jax.random.key(0), shape) for shape in ((rows, length, width), (width, vocab)))
    targets, weights = jnp.ones((rows, length), jnp.int32), jnp.ones((rows, length))

    def loss(h, head):
        return cross_entropy.chunked_nll(lambda x: x @ head, h, targets, weights, 16)

    gradient = jax.jit(jax.value_and_grad(loss, learned))
    alone, mesh = gradient(h, head), sharding.make_mesh(1, fsdp=2, context=2)
    at = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(("fsdp", "context")))
    placed = [jax.device_put(x, where) for x, where in zip((h, head), at, strict=True)]
    with sharding.mesh_context(placed):
        shared = gradient(*placed)
    jax.tree.map(lambda x, y: assert_close(x, y, relative=1e-5), shared, alone)


def test_a_head_with_integer_codes_can_be_chunked():
    h, head, targets, weights, body = _problem()
    codes = jnp.round(head * 10).astype(jnp.int8)

    def loss(body, codes, rows):
        x = h @ body
        logits = lambda x: x @ (codes.astype(jnp.float32) / 10)  # noqa: E731
        if not rows:
            return jnp.sum(cross_entropy.token_nll(logits(x), targets) * weights)
        return cross_entropy.chunked_nll(logits, x, targets, weights, rows)

    grad = jax.jit(jax.grad(loss), static_argnums=2)
    assert_close(grad(body, codes, 4), grad(body, codes, 0))


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(UserError, match="'causal_lm'"):
        build_objective("causal_ml")
