"""Weights of FLUX's autoencoder (diffusers ``AutoencoderKL``, subfolder ``vae``)."""

from metacanvas_jax.ckpt.table import CONV2D, LINEAR, SAME, Entry, Transform, then
from metacanvas_jax.vae.kl import KlConfig

POINTWISE = then(Transform(lambda x: x[..., 0, 0], lambda x: x[..., None, None]), LINEAR)  # 1x1 convolution to Dense


def _layer(name: str, path: str, kernel: Transform) -> list[Entry]:
    return [Entry(f"{name}.weight", f"{path}/kernel", kernel), Entry(f"{name}.bias", f"{path}/bias", SAME)]


def _norm(name: str, path: str) -> list[Entry]:
    return [Entry(f"{name}.weight", f"{path}/scale", SAME), Entry(f"{name}.bias", f"{path}/bias", SAME)]


def _block(name: str, path: str, shortcut: bool) -> list[Entry]:
    entries = [
        *_norm(f"{name}.norm1", f"{path}/norm1"),
        *_layer(f"{name}.conv1", f"{path}/conv1", CONV2D),
        *_norm(f"{name}.norm2", f"{path}/norm2"),
        *_layer(f"{name}.conv2", f"{path}/conv2", CONV2D),
    ]
    if shortcut:
        entries += _layer(f"{name}.conv_shortcut", f"{path}/shortcut", POINTWISE)
    return entries


def _middle(name: str, path: str) -> list[Entry]:
    attention = f"{name}.attentions.0"
    return [
        *_block(f"{name}.resnets.0", f"{path}/block_0", shortcut=False),
        *_block(f"{name}.resnets.1", f"{path}/block_1", shortcut=False),
        *_norm(f"{attention}.group_norm", f"{path}/attention/norm"),
        *_layer(f"{attention}.to_q", f"{path}/attention/q", LINEAR),
        *_layer(f"{attention}.to_k", f"{path}/attention/k", LINEAR),
        *_layer(f"{attention}.to_v", f"{path}/attention/v", LINEAR),
        *_layer(f"{attention}.to_out.0", f"{path}/attention/out", LINEAR),
    ]


def table(config: KlConfig) -> list[Entry]:
    """Every tensor of the published file; paths are relative to the parameters of ``Kl``."""
    entries = []
    for side in ("encoder", "decoder"):
        entries += _layer(f"{side}.conv_in", f"{side}/conv_in", CONV2D)
        entries += _middle(f"{side}.mid_block", f"{side}/middle")
        entries += _norm(f"{side}.conv_norm_out", f"{side}/norm_out")
        entries += _layer(f"{side}.conv_out", f"{side}/conv_out", CONV2D)
    entries += _stages("encoder", "down", config.channels, config.blocks)
    entries += _stages("decoder", "up", config.channels[::-1], config.blocks + 1)
    return entries


def _stages(side: str, way: str, channels: tuple[int, ...], blocks: int) -> list[Entry]:
    entries, width = [], channels[0]
    for i, features in enumerate(channels):
        stage = f"{side}.{way}_blocks.{i}"
        for j in range(blocks):
            entries += _block(f"{stage}.resnets.{j}", f"{side}/stages_{i}_block_{j}", shortcut=width != features)
            width = features
        if i < len(channels) - 1:
            entries += _layer(f"{stage}.{way}samplers.0.conv", f"{side}/{way}_{i}", CONV2D)
    return entries
