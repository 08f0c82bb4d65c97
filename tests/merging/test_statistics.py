"""The statistics of rules of merging against float64 formulas, and the command that computes them for a recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.merging import statistics
from lowrank.methods.lora import lora
from lowrank.objectives import causal_lm
from lowrank.pretrained.families import FAMILIES
from lowrank.quantization.layer_runner import LayerRunner
from tests.support import tiny_models
from tests.support.close import assert_close
from tests.support.float64 import in_float64

T, NAME = tiny_models.T, "layers/mlp/down/kernel"


def batch(rows=3, real=9, seed=0):
    """Rows of language modeling whose last tokens are padding; the first two weigh nothing."""
    ids, positions = tiny_models.tokens(rows, T + 1, seed), np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    weights = ((positions >= 2) & (positions < real - 1)).astype(np.float32)
    segments = (positions < real).astype(np.int32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions, "segments": segments} | {
        "weights": weights
    }


def loss_of(network):
    objective = causal_lm()

    def loss(params, batch):
        sums = objective.loss(network, params, batch, 0)
        return sums.total, sums.weight

    return loss


def test_the_fisher_is_the_mean_of_squared_gradients_of_rows_that_have_a_weight():
    network, params = tiny_models.decoder("llama", layers=1)
    loss, one = loss_of(network), batch(3)
    one["weights"][2] = 0
    found = statistics.fisher(loss, params, [one, one])
    per_row = jax.vmap(jax.grad(lambda p, row: loss(p, jax.tree.map(lambda x: x[None], row))[0]), (None, 0))
    gradients = in_float64(per_row, params, {k: v[:2] for k, v in one.items()})
    expected = {name: np.mean(g**2, axis=0) for name, g in tree.named_leaves(gradients)}
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert_close(x, expected[name], relative=1e-4)
    one["weights"][:] = 0
    with pytest.raises(UserError, match="hold no token that is learned"):
        statistics.fisher(loss, params, [one], chosen=lambda name: name == "norm/scale")


@pytest.mark.all
def test_labels_that_the_model_draws_give_the_true_fisher():
    """The mean over 400 draws is near the sum over all labels; that of the data's own labels is not."""
    network, params = tiny_models.decoder("llama", layers=1)
    one = batch(1)
    scale = params["norm"]["scale"]

    def logits(scale):
        whole = {**params, "norm": {"scale": scale}}
        h = network.apply({"params": whole}, one["tokens"], one["positions"], one["segments"], method="features")
        return network.apply({"params": whole}, h, method="logits")[0]

    @jax.jit
    def exact_fisher(scale):
        log_p, jacobian = (f(lambda s: jax.nn.log_softmax(logits(s)))(scale) for f in (lambda g: g, jax.jacfwd))
        return jnp.einsum("t,tv,tvd->d", one["weights"][0], jnp.exp(log_p), jacobian**2)

    exact = exact_fisher(scale)
    many = {k: np.repeat(v, 400, axis=0) for k, v in one.items()}
    only = {"chosen": lambda name: name == "norm/scale"}
    drawn = statistics.fisher(loss_of(network), params, [many], draw=statistics.draw_targets(network), **only)
    given = statistics.fisher(loss_of(network), params, [many], **only)
    assert_close(drawn["norm/scale"], exact, relative=0.1)
    assert np.linalg.norm(given["norm/scale"] - exact) > 0.5 * np.linalg.norm(exact)


@pytest.mark.all
def test_gram_matrices_are_those_of_the_inputs_of_real_tokens():
    network, params = tiny_models.decoder("llama")
    data = [batch(2), batch(2, seed=1)]
    found = statistics.grams(loss_of(network), params, data)
    names = [n for n in found if not n.endswith(statistics.OUTPUT_GRAM)]
    assert len(names) == 7
    runner = LayerRunner(network.config, params, names, [(b["tokens"], b["segments"]) for b in data])
    for i in range(network.config.layers):
        for name, (gram, _) in runner.kernel_inputs("layers", i).items():
            assert_close(found[name][i], gram / (4 * 9), relative=1e-5)
        runner.advance("layers", i, {})


def test_gram_matrices_of_gradients_by_outputs_through_an_adapter_that_adds_nothing():
    """Of one token, the gradient of a kernel is `x^T dy`, whose Gram matrix is that of dy times the square of x."""
    network, params = tiny_models.decoder("llama")
    one = batch(1, real=1) | {"weights": np.eye(1, T, dtype=np.float32)}
    down = lora(rank=2).rules[0][1](jax.random.key(0), params["layers"]["mlp"]["down"]["kernel"], NAME)
    adapted = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], "down": {"kernel": down}}}}
    found = statistics.grams(loss_of(network), adapted, [one], chosen=lambda n: "/mlp/" in n)
    gradients = in_float64(jax.grad(lambda p, b: loss_of(network)(p, b)[0]), params, one)
    for name, kernel in tree.named_leaves(gradients):
        if name in found:
            squares = np.trace(found[name], axis1=1, axis2=2)[:, None, None]
            outer = np.einsum("lio,lip->lop", kernel, kernel)
            assert_close(found[f"{name}.output_gram"] * squares, outer, relative=1e-4)
    assert len(found) == 6


def test_statistics_have_the_names_and_the_layout_of_tensors():
    network, _ = tiny_models.decoder("llama")
    tensors = FAMILIES["llama"].tensors(network.config)
    leaf = np.arange(2 * 24 * 16, dtype=np.float32).reshape(2, 24, 16)
    named = statistics.by_tensor(tensors, {NAME: leaf}, square=False)
    np.testing.assert_array_equal(named["model.layers.1.mlp.down_proj.weight"], leaf[1].T)
    found = {f"{NAME}{end}": leaf for end in ("", statistics.OUTPUT_GRAM)}
    named = statistics.by_tensor(tensors, found, square=True)
    assert len(named) == 4
    np.testing.assert_array_equal(named["model.layers.1.mlp.down_proj.weight.output_gram"], leaf[1])
