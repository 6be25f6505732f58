"""DC-AE's ``config.json`` as diffusers publishes it."""

from metacanvas_jax.errors import UserError
from metacanvas_jax.vae.dc_ae.network import DcAeConfig
from metacanvas_jax.weights.published import Fields


def read(f: Fields) -> DcAeConfig:
    """The sizes in the ``config.json`` of ``AutoencoderDC``."""
    stages = len(f("encoder_block_out_channels"))
    types = f.each("encoder_block_types", stages)
    attention_from = types.count("ResBlock")
    scales = [list(scale) for scale in f("encoder_qkv_multiscales")]
    windows = {scale[0] for scale in scales[attention_from:] if len(scale) == 1}
    if len(windows) > 1 or any(len(scale) != int(i >= attention_from) for i, scale in enumerate(scales)):
        raise UserError(f"{f.file}: encoder_qkv_multiscales {scales} is not built here: one size, in attention stages")
    wanted = ["ResBlock"] * attention_from + ["EfficientViTBlock"] * (stages - attention_from)
    for name, expected in (
        ("encoder_block_types", wanted),
        ("decoder_block_types", wanted),
        ("decoder_norm_types", ["rms_norm"] * stages),
        ("decoder_act_fns", ["silu"] * stages),
    ):
        if f(name, None) is not None and f.each(name, stages) != expected:
            raise UserError(f"{f.file}: {name} is {f(name)!r}; only {expected!r} is built here")
    f.only(decoder_block_out_channels=f("encoder_block_out_channels"), decoder_qkv_multiscales=scales)
    f.only(encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn="relu", in_channels=3)
    f.must(upsample_block_type="interpolate")
    if f("downsample_block_type") == "pixel_unshuffle":
        f.only(downsample_block_type="conv")
    return DcAeConfig(
        channels=tuple(f("encoder_block_out_channels")),
        encoder_blocks=tuple(f("encoder_layers_per_block")),
        decoder_blocks=tuple(f("decoder_layers_per_block")),
        attention_from=attention_from,
        latent_channels=f("latent_channels"),
        head_width=f("attention_head_dim"),
        scale=float(f("scaling_factor")),
        window=windows.pop() if windows else 5,
    )
