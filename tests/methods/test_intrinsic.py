"""Intrinsic dimension: each projection in float64 NumPy, its transpose and memory; adapters that reload exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core.errors import UserError
from lowrank.methods import projections
from lowrank.methods.projections import PROJECTIONS, Shape
from lowrank.weights import scaled
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close, difference
from tests.support.tiny_parameters import base

KEY, SHAPE, D = jax.random.key(3), Shape(301, 1000), 20


def dense_matrix():
    rows, chunks = projections._dense_chunks(SHAPE.size, D)
    draws = [jax.random.normal(jax.random.fold_in(KEY, i), (rows, D)) for i in range(chunks)]
    return np.concatenate(draws).astype(np.float64)[: SHAPE.size] / np.sqrt(SHAPE.total)


def sparse_matrix():
    matrix = np.zeros((SHAPE.size, D))
    for column in range(D):
        rows, values = projections.sparse_entries(KEY, jnp.int32(column), SHAPE)
        assert len(rows) == round(SHAPE.size / np.sqrt(SHAPE.total))
        assert_close(np.abs(values) ** 2 * len(rows), SHAPE.size / SHAPE.total)
        np.add.at(matrix[:, column], np.asarray(rows), np.asarray(values, np.float64))
    return matrix


def fastfood_matrix():
    signs, places, gauss = (np.asarray(x, np.float64) for x in projections.fastfood_blocks(KEY, SHAPE.size, D))
    n, blocks = 32, []
    h = hadamard(n).astype(np.float64)
    assert len(signs) > len(places) == projections.ORDERS  # so that permutations come again
    for i, (b, g) in enumerate(zip(signs, gauss, strict=True)):
        pi = places[i % len(places)].astype(int)
        assert sorted(pi) == list(range(n))
        block = h @ np.diag(g) @ np.eye(n)[pi] @ h @ np.diag(b) / (np.linalg.norm(g) * np.sqrt(SHAPE.total))
        blocks.append(block[:, :D])
    return np.concatenate(blocks)[: SHAPE.size]


MATRICES = {"dense": dense_matrix, "sparse": sparse_matrix, "fastfood": fastfood_matrix}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_projection_is_its_matrix_in_float64(kind, monkeypatch):
    monkeypatch.setattr(projections, "ORDERS", 3)
    matrix, rng = MATRICES[kind](), np.random.default_rng(0)
    x, g = rng.standard_normal(D), rng.standard_normal(SHAPE.size)

    @jax.jit
    def both(x, g):
        y, back = jax.vjp(lambda x: projections.project(kind, KEY, x, SHAPE), x)
        return y, back(g)[0]

    y, back = both(np.float32(x), np.float32(g))
    assert_close(y, matrix @ x)
    assert_close(back, matrix.T @ g)
    assert_close(np.mean(np.sum(matrix**2, axis=0)), SHAPE.size / SHAPE.total, relative=0.2)


@pytest.mark.parametrize("n", [1, 2, 256, 1024])
def test_the_hadamard_transform_in_factors_is_the_matrix(n):
    x = np.random.default_rng(0).standard_normal((3, n))
    assert_close(jax.jit(projections.walsh)(np.float32(x)), x @ hadamard(n))


def test_chunks_of_rows_and_columns_change_nothing(monkeypatch):
    x = jnp.linspace(-1, 1, D)
    whole = {kind: projections.project(kind, KEY, x, SHAPE) for kind in ("dense", "sparse")}
    monkeypatch.setattr(projections, "CHUNK", 7 * D)
    matrix, short = dense_matrix(), projections.project("dense", KEY, x, SHAPE)
    assert_close(short, matrix @ np.asarray(x, np.float64))
    assert_close(projections.project("sparse", KEY, x, SHAPE), whole["sparse"])


def moving(**group):
    """`(shared, bound)`: what the method starts from, and the base that such leaves give, as one program."""
    method = methods.build_method({"name": "intrinsic", **group})
    start = methods.attach(method, base(), jax.random.key(7))
    return start["shared"], jax.jit(lambda shared: method.bind({**start, "shared": shared}, None, None))


def test_the_vector_moves_every_target_and_said_scales_each_layer():
    shared, bound = moving(dim=9, target=r".*kernel", said=True)
    assert shared["intrinsic"].shape == (9 - 4,)  # three layers and the head have a scale each
    jax.tree.map(np.testing.assert_array_equal, bound({**shared, "intrinsic": np.zeros(5, np.float32)}), base())
    shared["intrinsic"] = np.arange(5, dtype=np.float32)
    plain = bound(shared)
    moved = bound({**shared, "said": {"layers": np.float32([1, 0, -2]), "head": np.float32(3)}})
    assert "shared" not in moved
    for get, factor in ((lambda p: p["layers"]["attn"]["q"]["kernel"], [1.0, 0.0, -2.0]),):
        step = np.asarray(get(plain)) - np.asarray(get(base()))
        assert np.abs(step).min(axis=(1, 2)).max() > 0
        expected = np.asarray(get(base())) + step * np.array(factor)[:, None, None]
        assert_close(get(moved), expected)
    head = [np.asarray(p["head"]["kernel"]) for p in (base(), plain, moved)]
    assert_close(head[2] - head[0], 3 * (head[1] - head[0]))
    np.testing.assert_array_equal(moved["layers"]["attn"]["q"]["bias"], base()["layers"]["attn"]["q"]["bias"])


def test_the_projection_comes_from_the_seed_alone():
    def q(seed):
        _, bound = moving(dim=9, seed=seed, target=".*q/kernel")
        return bound({"intrinsic": np.ones(9, np.float32)})["layers"]["attn"]["q"]["kernel"]

    one, two, other = q(0), q(0), q(1)
    np.testing.assert_array_equal(one, two)
    assert difference(one, other) > 1e-3


def test_a_target_that_is_a_form_is_named():
    params = base()
    params["layers"]["attn"]["q"]["kernel"] = scaled.attach(params["layers"]["attn"]["q"]["kernel"], "out")
    with pytest.raises(UserError, match="layers/attn/q/kernel is a Scaled, and a projection changes plain arrays only"):
        methods.attach(methods.build_method({"name": "intrinsic", "dim": 9}), params, jax.random.key(0))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_memory_is_that_of_the_parameters_never_of_the_matrix(kind):
    d, size = 512, 1 << 20  # P is 2 GiB in float32, the parameters 4 MiB
    method = methods.build_method({"name": "intrinsic", "dim": d, "projection": kind})
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)}}
    shapes = jax.eval_shape(lambda p: methods.attach(method, p, jax.random.key(0)), params)

    def loss(z, params):
        moved = method.bind({**params, "shared": {"intrinsic": z}}, None, None)
        return jnp.sum(jnp.sin(moved["layers"]["kernel"]))

    program = jax.jit(jax.grad(loss)).lower(shapes["shared"]["intrinsic"], params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 16 * 4 * size


def test_a_saved_vector_gives_back_exactly_the_weights(tmp_path):
    group = {"name": "intrinsic", "dim": 40, "said": True, "target": r"(layers/attn/q/kernel|norm/scale)"}
    model = pretrained.load(str(tiny.llama(tmp_path / "llama")))
    method = methods.build_method(group)
    params = methods.attach(method, model.params, jax.random.key(5))
    params["shared"] = jax.tree.map(lambda x: x + jnp.linspace(1, 2, x.size).reshape(x.shape), params["shared"])
    mask = methods.trainable_mask(method, params)
    adapter_files.save(params, model, tmp_path / "adapter", mask=mask, method=group)
    again = load.load_adapted(tmp_path / "adapter", str(tmp_path / "llama")).params
    jax.tree.map(np.testing.assert_array_equal, again, method.bind(params, None, None))
