"""The autoencoder's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.vae.flux2.network import FOLD, Flux2VaeConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> Flux2VaeConfig:
    """The sizes in the ``config.json`` of ``AutoencoderKLFlux2``."""
    f.only(mid_block_add_attention=True, act_fn="silu", in_channels=3, out_channels=3)
    f.among(patch_size=([FOLD, FOLD], (FOLD, FOLD)))
    f.skip(
        "force_upcast", "sample_size", "batch_norm_momentum"
    )  # dtype and tiles are chosen here; nothing is collected
    decoder = f("decoder_block_out_channels", None)
    config = Flux2VaeConfig(
        channels=tuple(f("block_out_channels")),
        decoder_channels=None if decoder is None else tuple(decoder),
        blocks=f("layers_per_block"),
        means=f("latent_channels"),
        groups=f("norm_num_groups"),
        quant=f("use_quant_conv", True),
        post_quant=f("use_post_quant_conv", True),
        eps=float(f("batch_norm_eps", 1e-4)),
    )
    stages = len(config.channels)
    f.only(down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages)
    return config
