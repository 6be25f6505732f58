"""The autoencoder's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.vae.wan.network import PATCH, WanVaeConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> WanVaeConfig:
    """The sizes in the ``config.json`` of ``AutoencoderKLWan``."""
    channels = 3 * PATCH**2
    f.must(is_residual=True, patch_size=PATCH, in_channels=channels, out_channels=channels)
    f.only(attn_scales=[], z_dim=len(f("latents_mean")))
    # Clipping was never built by diffusers either; the factors follow from the stages.
    f.skip("clip_output", "scale_factor_spatial", "scale_factor_temporal")
    return WanVaeConfig(
        encoder_width=f("base_dim"),
        decoder_width=f("decoder_base_dim", None) or f("base_dim"),
        multipliers=tuple(f("dim_mult")),
        blocks=f("num_res_blocks"),
        halve_time=tuple(f("temperal_downsample")),
        latent_mean=tuple(map(float, f("latents_mean"))),
        latent_std=tuple(map(float, f("latents_std"))),
    )
