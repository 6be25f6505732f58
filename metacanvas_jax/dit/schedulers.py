"""What the published schedulers of the DiTs have in common, as diffusers describes them."""

from metacanvas_jax.diffusion.schedules import TRAIN_STEPS
from metacanvas_jax.weights.published import Fields


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
