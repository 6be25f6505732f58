"""Sigma tables and whole trajectories against the schedulers of diffusers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.diffusion.samplers import sample_trajectory
from metacanvas_jax.diffusion.schedules import DynamicShift, dynamic
from metacanvas_jax.dit.flux.schedule import flux_dynamic
from metacanvas_jax.dit.flux2.schedule import flux2_empirical
from metacanvas_jax.dit.sana.schedule import sana_dpm
from metacanvas_jax.dit.wan.schedule import wan_unipc

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # noqa: E402

from metacanvas_jax.torch_export.samplers import schedule as exported_schedule  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = (1, 2, 3, 5, 20)
FLUX_TOKENS = 1024


def sana(steps):
    """As the published SANA pipelines configure it."""
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    return scheduler


def wan(steps):
    """As the published Wan2.2 pipelines configure it."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(steps)
    return scheduler


def flux(steps, tokens=FLUX_TOKENS):
    """As the FLUX pipelines call it, the shift by the number of latent tokens included."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    return scheduler


def flux2(steps, tokens=FLUX_TOKENS):
    """As the FLUX.2 pipelines call it, with a shift of their own."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    return scheduler


CASES = {
    "sana": (sana, sana_dpm, "dpmpp_2m"),
    "wan": (wan, wan_unipc, "unipc"),
    "flux": (flux, lambda steps: flux_dynamic(steps, FLUX_TOKENS), "euler"),
    "flux2": (flux2, lambda steps: flux2_empirical(steps, FLUX_TOKENS), "euler"),
}


@pytest.mark.parametrize("steps", (*STEPS, 28, 50, 100))
@pytest.mark.parametrize("name", CASES)
def test_tables_are_equal_bit_for_bit(name, steps):
    reference, ours, _ = CASES[name]
    scheduler, schedule = reference(steps), ours(steps)
    np.testing.assert_array_equal(np.asarray(schedule.sigmas, np.float32), scheduler.sigmas.numpy())
    timesteps = np.asarray(scheduler.timesteps.numpy(), np.float32)
    np.testing.assert_array_equal(np.asarray(schedule.times, np.float32), timesteps / np.float32(1000))


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 8192])
def test_flux_tables_follow_the_number_of_tokens(tokens):
    ours = np.asarray(flux_dynamic(28, tokens).sigmas, np.float32)
    np.testing.assert_array_equal(ours, flux(28, tokens).sigmas.numpy())


@pytest.mark.parametrize("steps", (4, 50))
@pytest.mark.parametrize("tokens", [64, 4096, 4300, 4301, 8192])
def test_flux2_tables_follow_tokens_and_steps_in_jax_and_in_torch(steps, tokens):
    ours = np.asarray(flux2_empirical(steps, tokens).sigmas, np.float32)
    np.testing.assert_array_equal(ours, flux2(steps, tokens).sigmas.numpy())
    sampler = {"schedule": "flux2_empirical", "steps": steps, "shift": 1.0}
    np.testing.assert_allclose(exported_schedule(sampler, tokens)[0], ours, rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", (2, 5, 28, 50))
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_stretched_tables_of_another_growth_are_equal_bit_for_bit(steps, tokens):
    """As the published folders of Qwen-Image configure it, in JAX and on the torch side."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    shift = DynamicShift(max_shift=0.9, max_tokens=8192, terminal=0.02)
    ours = dynamic(steps, tokens, shift)
    np.testing.assert_array_equal(np.asarray(ours.sigmas, np.float32), scheduler.sigmas.numpy())
    np.testing.assert_allclose(ours.times, scheduler.timesteps.numpy() / 1000, rtol=2e-7)
    sampler = {"schedule": "dynamic", "steps": steps, "shift": 1.0, "dynamic": dataclasses.asdict(shift)}
    np.testing.assert_allclose(exported_schedule(sampler, tokens)[0], ours.sigmas, rtol=0, atol=2e-7)


MIX = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)


def velocity(z, time):
    """A nonlinear stand-in for a network that is sharp in the latents and in the time it is told."""
    t = time[:, None, None, None, None]
    return jnp.tanh(1.5 * jnp.einsum("bthwc,cd->bthwd", z, MIX)) - 0.3 * z + jnp.sin(20 * t)


def torch_velocity(z, time):
    return torch.tanh(1.5 * torch.einsum("bthwc,cd->bthwd", z, torch.from_numpy(MIX))) - 0.3 * z + torch.sin(20 * time)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_trajectories_match(name, steps):
    reference, ours, method = CASES[name]
    noise = np.random.default_rng(2).normal(size=(2, 1, 3, 5, 4)).astype(np.float32)
    scheduler = reference(steps)
    latents, expected = torch.from_numpy(noise), [noise]
    for timestep in scheduler.timesteps:
        v = torch_velocity(latents, timestep.to(torch.float32) / 1000)
        latents = scheduler.step(v, timestep, latents, return_dict=False)[0]
        expected.append(latents.numpy())
    schedule = ours(steps)
    trajectory = jax.jit(lambda z: sample_trajectory(velocity, z, schedule, method))(jnp.asarray(noise))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(trajectory, np.stack(expected), rtol=0, atol=1e-5 * scale)
