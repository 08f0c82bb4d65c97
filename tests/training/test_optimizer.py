import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.training import optimizer as optim
from lowrank.training.optimizer import OptimConfig
from tests.support.close import assert_close, difference

STEPS = 10
TRAINED = {
    "frozen": None,
    "q": {"a": jnp.full((2, 3), 0.5), "b": jnp.full((3, 2), -0.25)},
    "norm": {"scale": jnp.ones((2, 4))},
    "bias": jnp.ones(3),
}


def _updates(config, trained=TRAINED, steps=3):
    optimizer = optim.build_optimizer(config, STEPS, trained)
    state, gradient = optimizer.init(trained), jax.tree.map(lambda x: x * 0.1 + 0.3, trained)
    for lr in optim.learning_rates(config, STEPS)[:steps]:
        update, state = optimizer.update(gradient, state, trained, lr=lr)
    return update


def _adafactor(lr):
    own = optax.adafactor(None, min_dim_size_to_factor=3, decay_rate=0.7, clipping_threshold=0.5)
    return optax.chain(own, optax.scale(-1.0), optax.add_decayed_weights(0.1), _down(lr))


REFERENCES = [
    ("adamw", {"b2": 0.95}, lambda lr: optax.adamw(lr, b2=0.95, weight_decay=0.1)),
    ("lion", {}, lambda lr: optax.lion(lr, weight_decay=0.1)),
    ("sgd", {"momentum": 0.9}, lambda lr: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), _down(lr))),
    ("adafactor", {"min_dim_size_to_factor": 3, "decay_rate": 0.7, "clipping": 0.5}, _adafactor),
]


def test_every_optimizer_has_a_reference():
    assert {name for name, *_ in REFERENCES} == set(optim.OPTIMIZERS)


@pytest.mark.parametrize(("name", "args", "reference"), REFERENCES)
def test_every_optimizer_is_optaxs_on_each_matrix_of_a_stack(name, args, reference):
    config = OptimConfig(name=name, args=args, lr=0.01, schedule="constant", weight_decay=0.1, clip=0, no_decay="")
    rng, sizes = np.random.default_rng(0), {"layers": (3,), "prefix": (3,), "top/mlp/experts/up": (3, 4), "head": ()}
    trained = {n: np.float32(rng.standard_normal((*stack, 4, 5))) for n, stack in sizes.items()}
    # The matrices of a stack differ in size, so a statistic over several of them is another one.
    gradients = [
        {
            n: np.float32(rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-2, 2, (*x.shape[:-2], 1, 1)))
            for n, x in trained.items()
        }
        for _ in range(3)
    ]
    ours, optax_ = optim.build_optimizer(config, STEPS, trained), reference(0.01)
    apart = jax.tree.map(lambda x: list(x.reshape(-1, 4, 5)), trained)
    state, state_apart = ours.init(trained), optax_.init(apart)
    for gradient in gradients:
        updates, state = ours.update(gradient, state, trained, lr=0.01)
        expected, state_apart = optax_.update(
            jax.tree.map(lambda x: list(x.reshape(-1, 4, 5)), gradient), state_apart, apart
        )
    for n, update in updates.items():
        for got, want in zip(update.reshape(-1, 4, 5), expected[n], strict=True):
            assert_close(got, want, name=n)


def _down(lr):
    return optax.scale_by_learning_rate(lr)


def test_b_ratio_scales_the_leaves_named_b_alone():
    one, plus = (_updates(OptimConfig(lr=0.01, b_ratio=ratio)) for ratio in (1.0, 16.0))
    assert_close(plus["q"]["b"], 16 * one["q"]["b"])
    np.testing.assert_array_equal(plus["q"]["a"], one["q"]["a"])
    np.testing.assert_array_equal(plus["bias"], one["bias"])


def test_weight_decay_spares_vectors_norms_and_biases():
    none, some = (_updates(OptimConfig(lr=0.01, weight_decay=decay)) for decay in (0.0, 0.5))
    assert difference(some["q"]["a"], none["q"]["a"]) > 1e-3
    np.testing.assert_array_equal(some["norm"]["scale"], none["norm"]["scale"])
    np.testing.assert_array_equal(some["bias"], none["bias"])


def test_ratio_zero_freezes_without_moments():
    config = OptimConfig(lr_ratios=((".*/a", 0.0),))
    assert not np.any(_updates(config)["q"]["a"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(optim.build_optimizer(config, STEPS, TRAINED).init(TRAINED))]
    assert (2, 3) not in shapes
    assert shapes.count((3, 2)) == 2


def test_the_clip_sees_the_trained_tree_whole():
    config = OptimConfig(name="sgd", lr=1.0, schedule="constant", clip=0.5, b_ratio=2.0)
    update = _updates(config, steps=1)
    gradient = jax.tree.map(lambda x: x * 0.1 + 0.3, TRAINED)
    factor = 0.5 / np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert_close(update["q"]["a"], -factor * gradient["q"]["a"])
    assert_close(update["q"]["b"], -2 * factor * gradient["q"]["b"])


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_schedules_warm_up_and_then_follow_their_curve(name, middle, end):
    rate = optim.learning_rate_schedule(OptimConfig(lr=2.0, schedule=name, warmup=4, final=0.1), 24)
    assert_close([rate(0), rate(2), rate(4)], [0.0, 1.0, 2.0])
    assert_close([rate(14), rate(24)], [2 * middle, 2 * end])
    again = optim.learning_rate_schedule(OptimConfig(lr=2.0, schedule=name, warmup=4, initial=0.1, final=0.1), 24)
    assert_close([again(0), again(2), again(4), again(14), again(24)], [0.2, 1.1, 2.0, 2 * middle, 2 * end])


@pytest.mark.parametrize("ratios", [(), (("q/.*", 0.0),)])
def test_a_decay_that_acts_on_no_leaf_is_refused(ratios):
    trained = {**TRAINED, "q": TRAINED["q"] if ratios else None}
    with pytest.raises(UserError, match=r"optim\.weight_decay=0\.1 acts on none of the trained leaves"):
        optim.build_optimizer(OptimConfig(weight_decay=0.1, lr_ratios=ratios), STEPS, trained)


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (OptimConfig(name="adam"), "'adamw'"),
        (OptimConfig(schedule="cosin"), "'cosine'"),
        (OptimConfig(args={"b3": 1.0}), "optim.args.b3"),
        (OptimConfig(lr=-1.0), "optim.lr"),
        (OptimConfig(warmup=11), "optim.warmup=11"),
        (OptimConfig(initial=0.1), "optim.initial=0.1 is where the warmup begins"),
        (OptimConfig(initial=-0.1, warmup=2), "optim.initial"),
        (OptimConfig(accumulate=0), "optim.accumulate"),
        (OptimConfig(lr_ratios=(("q/z", 2.0),)), "'q/z' matches no leaf"),
    ],
)
def test_bad_settings_are_named(config, culprit):
    with pytest.raises(UserError, match=culprit):
        optim.build_optimizer(config, STEPS, TRAINED)


@pytest.mark.parametrize(
    ("name", "changes"), [("sparse", "layers/up/kernel/values"), ("esft", "layers/up/kernel/delta"), ("lora", "")]
)
def test_decay_on_changes_of_pretrained_values_is_said(name, changes):
    method = methods.build_method({"name": name, "target": ".*kernel"})
    params = {"layers": {"up": {"kernel": jnp.ones((2, 4, 8, 8))}}}
    params = methods.attach(method, params, jax.random.key(0))
    trained = tree.split(params, methods.trainable_mask(method, params))[0]
    note = f"optim.weight_decay acts on {changes}: it draws the changed weights to their pretrained values"
    assert optim.decay_notes(OptimConfig(weight_decay=0.1), trained) == ((note,) if changes else ())
    assert not optim.decay_notes(OptimConfig(), trained)
