"""Weights of the stages of image autoencoders, as diffusers names them."""

from metacanvas_jax.vae.stages import Stages
from metacanvas_jax.weights.table import CONV2D, POINTWISE, Entry, linear, norm


def _block(name: str, path: str, shortcut: bool) -> list[Entry]:
    entries = [
        *norm(f"{name}.norm1", f"{path}/norm1"),
        *linear(f"{name}.conv1", f"{path}/conv1", kernel=CONV2D),
        *norm(f"{name}.norm2", f"{path}/norm2"),
        *linear(f"{name}.conv2", f"{path}/conv2", kernel=CONV2D),
    ]
    if shortcut:
        entries += linear(f"{name}.conv_shortcut", f"{path}/shortcut", kernel=POINTWISE)
    return entries


def _middle(name: str, path: str) -> list[Entry]:
    attention = f"{name}.attentions.0"
    return [
        *_block(f"{name}.resnets.0", f"{path}/block_0", shortcut=False),
        *_block(f"{name}.resnets.1", f"{path}/block_1", shortcut=False),
        *norm(f"{attention}.group_norm", f"{path}/attention/norm"),
        *linear(f"{attention}.to_q", f"{path}/attention/q"),
        *linear(f"{attention}.to_k", f"{path}/attention/k"),
        *linear(f"{attention}.to_v", f"{path}/attention/v"),
        *linear(f"{attention}.to_out.0", f"{path}/attention/out"),
    ]


def table(config: Stages, decoder: tuple[int, ...] | None = None) -> list[Entry]:
    """The tensors of ``encoder`` and ``decoder``; ``decoder`` are widths of its stages other than the encoder's."""
    entries = []
    for side in ("encoder", "decoder"):
        entries += linear(f"{side}.conv_in", f"{side}/conv_in", kernel=CONV2D)
        entries += _middle(f"{side}.mid_block", f"{side}/middle")
        entries += norm(f"{side}.conv_norm_out", f"{side}/norm_out")
        entries += linear(f"{side}.conv_out", f"{side}/conv_out", kernel=CONV2D)
    entries += _stages("encoder", "down", config.channels, config.blocks)
    entries += _stages("decoder", "up", (decoder or config.channels)[::-1], config.blocks + 1)
    return entries


def _stages(side: str, way: str, channels: tuple[int, ...], blocks: int) -> list[Entry]:
    entries, width = [], channels[0]
    for i, features in enumerate(channels):
        stage = f"{side}.{way}_blocks.{i}"
        for j in range(blocks):
            entries += _block(f"{stage}.resnets.{j}", f"{side}/stages_{i}_block_{j}", shortcut=width != features)
            width = features
        if i < len(channels) - 1:
            entries += linear(f"{stage}.{way}samplers.0.conv", f"{side}/{way}_{i}", kernel=CONV2D)
    return entries
