"""What the published schedulers of the DiTs have in common, as diffusers describes them."""

from metacanvas_jax.diffusion.schedules import TRAIN_STEPS, DynamicShift
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights.published import Fields
from metacanvas_jax.weights.record import Sampling


def one_way(f: Fields) -> None:
    """Refuses other noise levels than those of the shift, and other ways to report them."""
    f.only(num_train_timesteps=TRAIN_STEPS, time_shift_type="exponential")
    f.only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)


def flow_solver(f: Fields) -> None:
    """Refuses a multistep solver that is not of second order on flow sigmas down to zero."""
    one_way(f)
    f.must(prediction_type="flow_prediction", use_flow_sigmas=True)
    f.only(solver_order=2, lower_order_final=True, final_sigmas_type="zero")
    f.only(thresholding=False, use_dynamic_shifting=False)
    # Of thresholding, and of noise levels that come from betas, which flow sigmas replace.
    f.skip("dynamic_thresholding_ratio", "sample_max_value", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    f.skip("rescale_betas_zero_snr", "timestep_spacing", "steps_offset")


def flow_euler(f: Fields) -> Sampling:
    """``FlowMatchEulerDiscreteScheduler`` with dynamic shifting; the file says how the shift grows."""
    if not f("use_dynamic_shifting", False):
        raise UserError(f"{f.file}: use_dynamic_shifting is off; only a scheduler with it is rebuilt here")
    one_way(f)
    f.only(invert_sigmas=False, stochastic_sampling=False)
    f.skip("shift")  # of a scheduler without dynamic shifting
    shift = DynamicShift(
        base_shift=float(f("base_shift", 0.5)),
        max_shift=float(f("max_shift", 1.15)),
        base_tokens=f("base_image_seq_len", 256),
        max_tokens=f("max_image_seq_len", 4096),
        terminal=f("shift_terminal", None) or None,
    )
    return Sampling("dynamic", "euler", 1.0, shift)
