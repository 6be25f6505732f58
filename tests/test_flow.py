"""The path, the drawn noise levels and the loss of rectified flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, interpolate, sample_time, shift_time


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, 3, 2, 2, 4)), jnp.float32) for _ in range(2)]


def test_path_runs_from_data_to_noise(pair):
    latents, noise = pair
    time = jnp.array([0.0, 1.0], jnp.float32)
    mixed = interpolate(latents, noise, time)
    np.testing.assert_array_equal(mixed[0], latents[0])
    np.testing.assert_array_equal(mixed[1], noise[1])


def test_path_takes_one_level_per_frame(pair):
    latents, noise = pair
    time = jnp.array([[0.0, 0.25, 1.0], [0.5, 0.0, 0.75]], jnp.float32)
    mixed = interpolate(latents, noise, time)
    for b in range(2):
        for f in range(3):
            t = float(time[b, f])
            np.testing.assert_allclose(mixed[b, f], (1 - t) * latents[b, f] + t * noise[b, f], rtol=1e-6, atol=1e-6)


def test_loss_is_zero_for_the_true_velocity_and_sees_the_interpolated_latents(pair):
    latents, noise = pair
    time = jnp.array([0.3, 0.9], jnp.float32)

    def truth(mixed, t):
        # The velocity follows from the point on the path when the data are known.
        return (mixed - latents) / t[:, None, None, None, None]

    assert float(flow_loss(truth, latents, noise, time)) < 1e-10
    assert float(flow_loss(lambda z, t: -truth(z, t), latents, noise, time)) > 1


def test_masked_loss_is_the_mean_over_what_counts(pair):
    latents, noise = pair
    time = jnp.array([0.3, 0.9], jnp.float32)
    mask = jnp.array([[False, True, True], [False, True, False]])[:, :, None, None]
    zero = lambda z, t: jnp.zeros_like(z)  # noqa: E731
    errors = np.square(np.asarray(noise - latents)).mean((2, 3, 4))
    expected = (errors[0, 1] + errors[0, 2] + errors[1, 1]) / 3
    np.testing.assert_allclose(flow_loss(zero, latents, noise, time, mask), expected, rtol=1e-6)
    assert float(flow_loss(zero, latents, noise, time, jnp.zeros_like(mask))) == 0


def test_loss_ignores_non_finite_values_that_do_not_count(pair):
    latents, noise = pair
    mask = jnp.array([False, True, True])[None, :, None, None] & jnp.ones((2, 1, 1, 1), bool)
    broken = lambda z, t: jnp.zeros_like(z).at[:, 0].set(jnp.nan)  # noqa: E731
    assert np.isfinite(flow_loss(broken, latents, noise, jnp.array([0.3, 0.9], jnp.float32), mask))


def test_loss_is_float32_for_bfloat16_latents(pair):
    latents, noise = (x.astype(jnp.bfloat16) for x in pair)
    loss = flow_loss(lambda z, t: z, latents, noise, jnp.array([0.3, 0.9], jnp.float32))
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "quantiles"),
    [
        (TimeConfig(kind="uniform"), [0.25, 0.5, 0.75]),
        (TimeConfig(kind="uniform", shift=3.0), [0.5, 0.75, 0.9]),  # 3q / (1 + 2q)
        (TimeConfig(mean=0.6, std=1.1), [0.4645, 0.6457, 0.7928]),  # sigmoid(0.6 + 1.1 * (-0.6745, 0, 0.6745))
        (TimeConfig(shift=3.0), [0.6045, 0.75, 0.8548]),
    ],
    ids=["uniform", "uniform_shifted", "logit_normal", "logit_normal_shifted"],
)
def test_noise_levels_have_the_quartiles_of_their_distribution(config, quantiles):
    time = np.asarray(sample_time(jax.random.key(0), (200, 100), config))
    assert time.shape == (200, 100) and time.dtype == np.float32
    assert time.min() >= 0 and time.max() <= 1
    np.testing.assert_allclose(np.quantile(time, [0.25, 0.5, 0.75]), quantiles, atol=0.01)


def test_shift_keeps_the_ends_and_composes():
    time = jnp.array([0.0, 0.2, 0.5, 1.0], jnp.float32)
    np.testing.assert_allclose(shift_time(time, 3.0), [0.0, 3 / 7, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(shift_time(shift_time(time, 3.0), 2.0), shift_time(time, 6.0), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"shift": -1.0}])
def test_bad_time_config_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"time.{next(iter(wrong))}"):
        TimeConfig(**wrong)
