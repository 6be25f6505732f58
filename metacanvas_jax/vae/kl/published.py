"""The autoencoder's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.vae.kl.network import KlConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> KlConfig:
    """The sizes in the ``config.json`` of ``AutoencoderKL``."""
    f.must(use_quant_conv=False, use_post_quant_conv=False)
    f.only(mid_block_add_attention=True, act_fn="silu", latents_mean=None, latents_std=None)
    f.only(in_channels=3, out_channels=3)
    f.skip("force_upcast", "sample_size")  # the dtype, and the size of tiles, are chosen here
    config = KlConfig(
        channels=tuple(f("block_out_channels")),
        blocks=f("layers_per_block"),
        latent_channels=f("latent_channels"),
        groups=f("norm_num_groups"),
        scale=float(f("scaling_factor")),
        shift=float(f("shift_factor", None) or 0.0),
    )
    stages = len(config.channels)
    f.only(down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages)
    return config
