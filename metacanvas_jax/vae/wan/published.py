"""The autoencoder's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.vae.wan.network import WanVaeConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> WanVaeConfig:
    """The sizes in the ``config.json`` of ``AutoencoderKLWan`` or ``AutoencoderKLQwenImage``."""
    residual = f("is_residual", False)
    patch = 2 if residual else 1
    colours = 3 * patch**2
    if residual:
        f.must(patch_size=patch, in_channels=colours, out_channels=colours)
    else:
        f.among(patch_size=(None, patch))
        f.only(in_channels=colours, out_channels=colours, input_channels=colours)
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
        folded=patch,
        shortcuts=residual,
    )
