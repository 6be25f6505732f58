"""Schedules, samplers and guidance on problems whose solution is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.diffusion.guidance import classifier_free, pair, with_norms_of
from metacanvas_jax.diffusion.samplers import sample, sample_trajectory
from metacanvas_jax.diffusion.schedules import DynamicShift, Schedule, dynamic, linear
from metacanvas_jax.dit.flux.schedule import flux_dynamic
from metacanvas_jax.dit.sana.schedule import sana_dpm
from metacanvas_jax.dit.wan.schedule import wan_unipc
from metacanvas_jax.types import Plan, States

MEAN, STD = 0.7, 0.4


def gaussian_velocity(z, time):
    """The exact velocity when the data are normal(MEAN, STD): the path keeps every quantile."""
    t = time[:, None, None, None, None]
    spread = jnp.sqrt((1 - t) ** 2 * STD**2 + t**2)
    slope = (t - (1 - t) * STD**2) / spread
    return -MEAN + slope * (z - (1 - t) * MEAN) / spread


def run(velocity, noise, schedule, method="euler", **options):
    return jax.jit(lambda z: sample(velocity, z, schedule, method, **options))(noise)


@pytest.fixture(scope="module")
def noise():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3, 2, 4)), jnp.float32)


def error(noise, schedule, method):
    exact = MEAN + STD * noise
    return float(jnp.abs(run(gaussian_velocity, noise, schedule, method) - exact).max())


def test_euler_on_an_even_grid_adds_up_the_velocities(noise):
    constant = jax.tree.map(lambda x: 0.3 * x, noise)
    np.testing.assert_allclose(
        run(lambda z, t: constant, noise, linear(7, 2.0)), noise - constant, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m", "unipc"])
def test_any_number_of_steps_finds_a_single_data_point(noise, method):
    """With one data point all paths are straight, so no method errs, as long as it is told the exact levels."""
    target = jnp.full_like(noise, 0.5)
    to_target = lambda z, t: (z - target) / t[:, None, None, None, None]  # noqa: E731
    for sigmas in (linear(1).sigmas, linear(5, 3.0).sigmas, sana_dpm(4).sigmas, wan_unipc(4).sigmas):
        schedule = Schedule(sigmas, sigmas[:-1])
        np.testing.assert_allclose(run(to_target, noise, schedule, method), target, rtol=1e-5)


def test_second_order_methods_are_far_closer_at_equal_cost(noise):
    euler, twice = error(noise, linear(20), "euler"), error(noise, linear(40), "euler")
    assert 1.8 < euler / twice < 2.2
    dpmpp, unipc = error(noise, linear(20), "dpmpp_2m"), error(noise, linear(20), "unipc")
    assert unipc < dpmpp < euler / 5


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m", "unipc"])
def test_stopping_early_gives_what_the_network_sees_at_that_step(noise, method):
    schedule, seen = linear(4, 3.0), []
    trajectory = jax.jit(lambda z: sample_trajectory(gaussian_velocity, z, schedule, method))(noise)
    with jax.disable_jit():

        def recording(z, t):
            seen.append((float(t[0]), np.asarray(z)))
            return gaussian_velocity(z, t)

        result = sample(recording, noise, schedule, method)
    assert [t for t, _ in seen] == list(schedule.times)
    np.testing.assert_allclose(trajectory, np.stack([z for _, z in seen] + [np.asarray(result)]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(gaussian_velocity, noise, schedule, method, stop=2), trajectory[2])
    np.testing.assert_array_equal(run(gaussian_velocity, noise, schedule, method, stop=0), noise)


def test_low_precision_network_is_integrated_in_float32(noise):
    low = lambda z, t: gaussian_velocity(z, t).astype(jnp.bfloat16)  # noqa: E731
    result = run(low, noise.astype(jnp.bfloat16), linear(20), "dpmpp_2m")
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, MEAN + STD * noise, atol=0.03)


def test_step_near_half_noise():
    assert linear(4).step_near(0.5) == 2
    assert sana_dpm(5).times[sana_dpm(5).step_near(0.5)] == pytest.approx(0.428)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: linear(0),
        lambda: sana_dpm(5, shift=0.0),
        lambda: flux_dynamic(5, tokens=0),
        lambda: Schedule((1.0, 0.5), (1.0,)),
        lambda: Schedule((0.5, 0.7, 0.0), (0.5, 0.7)),
        lambda: Schedule((0.5, 0.0), (0.5, 0.0)),
        lambda: Schedule((0.0,), ()),
    ],
    ids=["no_steps", "no_shift", "no_tokens", "not_to_zero", "rising", "lengths", "empty"],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match=r"step|shift|tokens|sigmas"):
        wrong()


def test_unknown_method_and_stop_beyond_the_end_are_refused(noise):
    with pytest.raises(ValueError, match=r"'heun'.*euler, dpmpp_2m, unipc"):
        sample(gaussian_velocity, noise, linear(2), "heun")
    with pytest.raises(ValueError, match=r"stop is step 3.*2 steps"):
        sample(gaussian_velocity, noise, linear(2), stop=3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_moves_from_unconditional_to_conditional(noise, scale):
    prompt, nothing = (
        Plan(States(jnp.full((2, 3, 4), value, jnp.float32), jnp.ones((2, 3), bool))) for value in (2.0, -1.0)
    )
    both = pair(prompt, nothing)
    assert both.canvas is None and both.text.mask.shape == (4, 3)

    def network(z, t):
        return z * t[:, None, None, None, None] + both.text.states[:, :1, None, None, :]

    velocity = classifier_free(network, scale)(noise, jnp.array([0.25, 0.75], jnp.float32))
    alone = noise * jnp.array([0.25, 0.75], jnp.float32)[:, None, None, None, None]
    np.testing.assert_allclose(velocity, alone - 1 + 3 * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 3)])
def test_rescaled_guidance_has_the_norms_of_the_prompt_in_every_patch(noise, patch):
    def network(z, t):
        return z * jnp.linspace(0.5, 2.0, z.shape[0], dtype=jnp.float32)[:, None, None, None, None] + 0.1 * z**2

    rows, columns = 2 * patch[1], 2 * patch[2]
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, rows, columns, 3)), jnp.float32)
    time = jnp.ones(1)
    conditional, _ = jnp.split(network(jnp.concatenate([z, z]), None), 2)
    plain, scaled = (classifier_free(network, 4.0, rescale)(z, time) for rescale in (None, patch))

    def cut(x):
        return np.asarray(x).reshape(2, patch[1], 2, patch[2], 3).swapaxes(1, 2).reshape(4, -1)

    ours, free, target = map(cut, (scaled, plain, conditional))
    norm = lambda x: np.linalg.norm(x, axis=1)  # noqa: E731
    np.testing.assert_allclose(norm(ours), norm(target), rtol=1e-5)
    np.testing.assert_allclose(ours / norm(ours)[:, None], free / norm(free)[:, None], rtol=1e-4, atol=1e-6)
    assert np.abs(norm(free) - norm(target)).max() > 0.1
    assert not np.any(with_norms_of(z, jnp.zeros_like(z), patch))


def test_a_dynamic_shift_of_impossible_numbers_is_refused():
    with pytest.raises(ValueError, match="base_tokens 9 must be below max_tokens 9"):
        DynamicShift(base_tokens=9, max_tokens=9)
    with pytest.raises(ValueError, match="terminal must be a noise level"):
        DynamicShift(terminal=1.0)
    with pytest.raises(ValueError, match="at least two steps; got 1"):
        dynamic(1, 64, DynamicShift(terminal=0.02))
