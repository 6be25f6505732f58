"""Weights of DC-AE (diffusers ``AutoencoderDC``, subfolder ``vae``)."""

from metacanvas_jax.vae.dc_ae.network import DcAeConfig
from metacanvas_jax.weights.table import CONV2D, DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, Transform, linear, norm


def _groups(width: int) -> Transform:
    """A grouped 1x1 convolution ``[g o, i, 1, 1]`` to ``[g, i, o]``."""
    return Transform(
        lambda x: x.reshape(-1, width, width).transpose(0, 2, 1),
        lambda x: x.transpose(0, 2, 1).reshape(-1, width, 1, 1),
    )


def _conv_block() -> list[tuple[str, str, Transform]]:
    return [
        ("conv1.weight", "conv1/kernel", CONV2D),
        ("conv1.bias", "conv1/bias", SAME),
        ("conv2.weight", "conv2/kernel", CONV2D),
        ("norm.weight", "norm/scale", SAME),
        ("norm.bias", "norm/bias", SAME),
    ]


def _attention_block(head_width: int) -> list[tuple[str, str, Transform]]:
    return [
        ("attn.to_q.weight", "attention/qkv_0/kernel", LINEAR),
        ("attn.to_k.weight", "attention/qkv_1/kernel", LINEAR),
        ("attn.to_v.weight", "attention/qkv_2/kernel", LINEAR),
        ("attn.to_qkv_multiscale.0.proj_in.weight", "attention/blur/depth", DEPTHWISE),
        ("attn.to_qkv_multiscale.0.proj_out.weight", "attention/blur/point", _groups(head_width)),
        ("attn.to_out.weight", "attention/out/kernel", LINEAR),
        ("attn.norm_out.weight", "attention_norm/scale", SAME),
        ("attn.norm_out.bias", "attention_norm/bias", SAME),
        ("conv_out.conv_inverted.weight", "ffn/expand/kernel", POINTWISE),
        ("conv_out.conv_inverted.bias", "ffn/expand/bias", SAME),
        ("conv_out.conv_depth.weight", "ffn/depth/kernel", DEPTHWISE),
        ("conv_out.conv_depth.bias", "ffn/depth/bias", SAME),
        ("conv_out.conv_point.weight", "ffn/reduce/kernel", POINTWISE),
        ("conv_out.norm.weight", "ffn_norm/scale", SAME),
        ("conv_out.norm.bias", "ffn_norm/bias", SAME),
    ]


def table(config: DcAeConfig) -> list[Entry]:
    """Every tensor of the published file; paths are relative to the parameters of ``DcAe``.

    The down step stands last in a published stage of the encoder, the up step first in one of the decoder.
    """
    entries, last = [], len(config.channels) - 1
    for side in ("encoder", "decoder"):
        entries += linear(f"{side}.conv_in", f"{side}/conv_in", kernel=CONV2D)
        entries += linear(f"{side}.conv_out", f"{side}/conv_out", kernel=CONV2D)
    entries += norm("decoder.norm_out", "decoder/norm_out")
    for i in range(len(config.channels)):
        block = _attention_block(config.head_width) if i >= config.attention_from else _conv_block()
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        blocks, first = config.encoder_blocks[i], int(i < last)
        for name, path, transform in block:
            entries.append(Entry(f"{down}.{{i}}.{name}", f"encoder/stages_{i}/{path}", transform, blocks))
            entries.append(
                Entry(
                    f"{up}.{{i}}.{name}",
                    f"decoder/stages_{i}/{path}",
                    transform,
                    config.decoder_blocks[i],
                    first=first,
                )
            )
        if i < last:
            entries += linear(f"{down}.{blocks}.conv", f"encoder/down_{i}", kernel=CONV2D)
            entries += linear(f"{up}.0.conv", f"decoder/up_{i}", kernel=CONV2D)
    return entries
