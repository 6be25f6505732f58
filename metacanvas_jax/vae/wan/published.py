"""The autoencoder's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.vae.wan.network import PATCH, WanVaeConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> WanVaeConfig:
    """The sizes in the ``config.json`` of ``AutoencoderKLWan``."""
    f.only(is_residual=True, patch_size=PATCH, attn_scales=[])
    return WanVaeConfig(
        encoder_width=f("base_dim"),
        decoder_width=f("decoder_base_dim"),
        multipliers=tuple(f("dim_mult")),
        blocks=f("num_res_blocks"),
        halve_time=tuple(f("temperal_downsample")),
        latent_mean=tuple(map(float, f("latents_mean"))),
        latent_std=tuple(map(float, f("latents_std"))),
    )
