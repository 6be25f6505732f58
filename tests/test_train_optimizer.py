import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.optimizer import decayed, global_norm, learning_rate, make_optimizer

# The settings of the paper: section 3.1, Table 13, and the three stages of Table 16.
EXPLORATORY = OptimizerConfig(1e-4, warmup_steps=300, warmup_from=1e-5)
EDITING = OptimizerConfig(1e-6, b1=0.9, b2=0.99, eps=1e-8)
STAGES = [OptimizerConfig(rate, warmup_steps=100) for rate in (1e-3, 2e-5, 1e-5)]


def rates(config, steps):
    return [float(learning_rate(config, step)) for step in steps]


def test_exploratory_schedule_of_the_paper_rises_from_1e_5_and_stays_at_1e_4():
    np.testing.assert_allclose(
        rates(EXPLORATORY, [0, 150, 299, 300, 20_000]), [1e-5, 5.5e-5, 9.97e-5, 1e-4, 1e-4], rtol=1e-6
    )


def test_editing_schedule_of_the_paper_has_no_warm_up():
    np.testing.assert_allclose(rates(EDITING, [0, 1, 90_000]), [1e-6] * 3, rtol=1e-6)


def test_video_schedules_of_the_paper_rise_over_100_steps():
    for config in STAGES:
        peak = config.learning_rate
        np.testing.assert_allclose(rates(config, [0, 50, 100, 15_000]), [0, peak / 2, peak, peak], rtol=1e-6)


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.775), ("cosine", 0.1 + 0.9 * 0.8535534)])
def test_decay_to_a_final_fraction(schedule, quarter):
    config = OptimizerConfig(2.0, warmup_steps=10, schedule=schedule, total_steps=110, final_fraction=0.1)
    np.testing.assert_allclose(
        rates(config, [0, 5, 10, 35, 110, 500]), [0, 1, 2, 2 * quarter, 0.2, 0.2], rtol=1e-5, atol=1e-7
    )


def adam_by_hand(config, params, grads):
    """Kingma and Ba with decoupled decay, in float64."""
    m = v = np.zeros_like(params)
    for step, grad in enumerate(grads):
        norm = np.sqrt(np.sum(grad**2))
        grad = grad * min(1.0, (config.clip or np.inf) / norm)
        m, v = config.b1 * m + (1 - config.b1) * grad, config.b2 * v + (1 - config.b2) * grad**2
        bias1, bias2 = 1 - config.b1 ** (step + 1), 1 - config.b2 ** (step + 1)
        rate = float(learning_rate(config, step))
        params = params - rate * (m / bias1 / (np.sqrt(v / bias2) + config.eps) + config.weight_decay * params)
    return params


@pytest.mark.parametrize("clip", [None, 1.0, 5.0])
def test_updates_are_clipped_adamw(clip):
    config = OptimizerConfig(1e-2, warmup_steps=2, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip=clip)
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 4)), 3 * rng.normal(size=(4, 3, 4))
    optimizer = make_optimizer(config)
    params = {"dense": {"kernel": jnp.asarray(start, jnp.float32)}}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update({"dense": {"kernel": jnp.asarray(grad, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["dense"]["kernel"], adam_by_hand(config, start, grads), rtol=1e-5)


def test_only_kernels_decay_and_the_norm_is_global():
    params = {"layers": {"norm": {"scale": jnp.ones((2, 3))}, "mlp": {"kernel": jnp.ones((2, 3, 3))}}, "kernel": 1.0}
    config = OptimizerConfig(1.0, weight_decay=0.1)
    assert decayed(params, config) == {
        "layers": {"norm": {"scale": False}, "mlp": {"kernel": True}},
        "kernel": True,
    }
    assert float(global_norm({"a": jnp.full((2,), 2.0), "b": {"c": jnp.full((1,), 1.0)}})) == 3.0


def test_decay_that_finds_no_parameter_is_an_error():
    optimizer = make_optimizer(OptimizerConfig(1.0, weight_decay=0.1, decay_rule="kernel"))
    with pytest.raises(UserError, match="'kernel' matches none of 1 trainable parameters"):
        optimizer.init({"canvas": {"tokens": jnp.ones((2,))}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, "needs total_steps > warmup_steps"),
        ({"schedule": "linear", "total_steps": 5, "warmup_steps": 5}, "needs total_steps > warmup_steps"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"b2": 1.0}, "b1 and b2 must lie in"),
        ({"clip": 0.0}, "optimizer.clip is 0.0"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**({"learning_rate": 1.0} | fields))
