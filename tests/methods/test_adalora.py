"""AdaLoRA's schedule, scores and allocation beside the paper's formulas in float64 NumPy (arXiv:2303.10512)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.methods.adalora import kept_share
from lowrank.training import build
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.regularized import penalty_of
from tests.support.tiny_parameters import base
from tests.support.tiny_runs import config_of

STEPS, FIRST, LAST, EVERY, RANK, TARGET = 30, 3, 24, 3, 4, 2
GROUP = {"name": "adalora", "init_rank": RANK, "target_rank": TARGET, "alpha": 6.0, "target": r".*attn/(q|v)/kernel"}
SCHEDULE = {"tinit": FIRST, "tfinal": STEPS - LAST, "deltaT": EVERY}


def budget(t, start, end, total, warm, final):
    """Section 3.3: b(t) of a run of `total` steps."""
    if t < warm:
        return start
    if t >= total - final:
        return end
    return int(end + (start - end) * (1 - (t - warm) / (total - warm - final)) ** 3)


@pytest.mark.parametrize("n", [1, 7, 24])
def test_the_budget_falls_as_a_cube(n):
    ours = [int(kept_share(t, first=3, last=24, ratio=2 / 4) * 4 * n + 1e-9) for t in range(31)]
    assert ours == [budget(t, 4 * n, 2 * n, 30, 3, 6) for t in range(31)]


def attached():
    """`(optimizer of a run, trained leaves, gradients of each step)`; plain SGD, so that the expectation is simple."""
    method = methods.build_method({**GROUP, **SCHEDULE, "orthogonal": 0.0})
    params = methods.attach(method, base(), jax.random.key(1))
    trained = tree.split(params, methods.trainable_mask(method, params))[0]
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return method.hooks.optimizer(optax.sgd(0.05), STEPS), trained, [jax.tree.map(noise, trained) for _ in range(STEPS)]


def flat(tree_):
    return {name.removeprefix("layers/attn/"): np.asarray(x, np.float64) for name, x in tree.named_leaves(tree_)}


def expected(trained, gradients):
    """Algorithm 1, entry by entry: `(the leaves after each step, the number of triplets left after each)`."""
    w = flat(trained)
    average, spread = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    after, left, choice = [], [], None
    for t, gradient in enumerate(map(flat, gradients), start=1):
        for name in w:
            importance = np.abs(w[name] * gradient[name])
            average[name] = 0.85 * average[name] + 0.15 * importance
            spread[name] = 0.85 * spread[name] + 0.15 * np.abs(importance - average[name])
        w = {name: x - 0.05 * gradient[name] for name, x in w.items()}
        if (FIRST < t < LAST and t % EVERY == 0) or t == LAST:
            score = {name: average[name] * spread[name] for name in w}
            triplets = {}
            for module in "qv":
                a, e, b = (score[f"{module}/kernel/{field}"] for field in "aeb")
                for layer, k in np.ndindex(e.shape):
                    triplets[module, layer, k] = e[layer, k] + a[layer, :, k].mean() + b[layer, k].mean()
            order = sorted(triplets, key=triplets.get, reverse=True)
            choice = set(order[budget(t, len(order), len(order) * TARGET // RANK, STEPS, FIRST, STEPS - LAST) :])
            pruned = choice
        else:
            pruned = choice if t > LAST else ()
        for module, layer, k in pruned:
            w[f"{module}/kernel/e"][layer, k] = 0
        after.append({name: x.copy() for name, x in w.items()})
        left.append(sum(int(np.count_nonzero(w[f"{m}/kernel/e"])) for m in "qv"))
    return after, left


def test_the_allocation_is_that_of_the_papers_algorithm():
    optimizer, trained, gradients = attached()
    state, step = optimizer.init(trained), jax.jit(optimizer.update)
    want, left = expected(trained, gradients)
    assert left[LAST - 1 :] == [TARGET * 6] * (STEPS - LAST + 1)
    assert TARGET * 6 < left[11] < RANK * 6
    for t, gradient in enumerate(gradients):
        updates, state = step(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
        for name, x in flat(trained).items():
            assert_close(x, want[t][name], name=f"{name} after step {t + 1}")
    ranks = np.count_nonzero(flat(trained)["q/kernel/e"], axis=1)
    assert len(set(ranks.tolist())) > 1  # the layers of a stack differ


def test_the_update_and_its_orthogonality_in_float64():
    method = methods.build_method({**GROUP, "orthogonal": 0.1})
    params = methods.attach(method, base(), jax.random.key(1))
    layers = params["layers"]["attn"]
    rest = 0.0
    for module in "qv":
        w = layers[module]["kernel"]
        w = layers[module]["kernel"] = w.__class__(**{**vars(w), "e": w.e + jnp.arange(1.0, RANK + 1)[None, :]})
        base_, a, b, e = (np.asarray(x, np.float64) for x in (w.base, w.a, w.b, w.e))
        for layer in range(len(a)):
            q, p = a[layer].T, b[layer].T  # the paper's Q [r, in] and P [out, r]
            update = 6.0 / RANK * p @ np.diag(e[layer]) @ q
            assert_close(w.materialize()[layer], base_[layer] + update.T)
            rest += np.sum((p.T @ p - np.eye(RANK)) ** 2) + np.sum((q @ q.T - np.eye(RANK)) ** 2)
    assert_close(penalty_of(method, params), 0.1 * rest)


def test_a_run_that_leaves_no_step_to_prune_in_is_refused(tmp_path):
    tiny.llama(tmp_path / "llama")
    tiny.records(tmp_path / "records.jsonl")
    config = config_of(tmp_path, "method=adalora,init_rank=4,target_rank=2,tinit=5.0,tfinal=3.0")
    with pytest.raises(UserError, match=r"method.tinit 5.0 and method.tfinal 3.0 leave none of 8 steps"):
        build.build_run(config)
