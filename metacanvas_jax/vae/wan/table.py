"""Weights of the Wan autoencoders (diffusers ``AutoencoderKLWan``, subfolder ``vae``)."""

from metacanvas_jax.vae.wan.network import WanVaeConfig
from metacanvas_jax.weights.table import CONV2D, CONV3D, POINTWISE, Entry, Transform, linear, pointwise

POINTWISE3D = pointwise(3)
GAIN2D = Transform(lambda x: x[:, 0, 0], lambda x: x[:, None, None])
GAIN3D = Transform(lambda x: x[:, 0, 0, 0], lambda x: x[:, None, None, None])


def _block(name: str, path: str, shortcut: bool) -> list[Entry]:
    entries = [
        Entry(f"{name}.norm1.gamma", f"{path}/norm1/scale", GAIN3D),
        *linear(f"{name}.conv1", f"{path}/conv1", kernel=CONV3D),
        Entry(f"{name}.norm2.gamma", f"{path}/norm2/scale", GAIN3D),
        *linear(f"{name}.conv2", f"{path}/conv2", kernel=CONV3D),
    ]
    return [*entries, *linear(f"{name}.conv_shortcut", f"{path}/shortcut", kernel=POINTWISE3D)] if shortcut else entries


def _stages(side: str, widths: list[int], blocks: int, time: tuple[bool, ...], shortcuts: bool) -> list[Entry]:
    step = "down" if side == "encoder" else "up"
    entries, width = [], widths[0]
    for i, features in enumerate(widths[1:]):
        path = f"{side}/stages_{i}"
        resnets, sampler = _names(f"{side}.{step}_blocks", step, i, blocks, shortcuts)
        for j, name in enumerate(resnets):
            entries += _block(name, f"{path}/block_{j}", shortcut=width != features)
            width = features
        if i < len(time):
            entries += linear(f"{sampler}.resample.1", f"{path}/{step}/space", kernel=CONV2D)
            if time[i]:
                entries += linear(f"{sampler}.time_conv", f"{path}/{step}/time", kernel=CONV3D)
            width = features if step == "down" or shortcuts else features // 2
    return entries


def _names(stages: str, step: str, i: int, blocks: int, shortcuts: bool) -> tuple[list[str], str]:
    """Published names of the residual blocks and of the resampling of a stage."""
    if step == "down" and not shortcuts:  # one list of all layers
        first = i * (blocks + 1)
        return [f"{stages}.{first + j}" for j in range(blocks)], f"{stages}.{first + blocks}"
    sampler = f"{step}sampler" if shortcuts else f"{step}samplers.0"
    return [f"{stages}.{i}.resnets.{j}" for j in range(blocks)], f"{stages}.{i}.{sampler}"


def table(config: WanVaeConfig) -> list[Entry]:
    """Every tensor of the published file; paths are relative to the parameters of ``WanVae``."""
    entries = [
        *linear("quant_conv", "encoder/project", kernel=POINTWISE3D),
        *linear("post_quant_conv", "decoder/project", kernel=POINTWISE3D),
    ]
    for side in ("encoder", "decoder"):
        middle, path = f"{side}.mid_block", f"{side}/middle"
        entries += [
            *linear(f"{side}.conv_in", f"{side}/conv_in", kernel=CONV3D),
            *_block(f"{middle}.resnets.0", f"{path}/block_0", shortcut=False),
            *_block(f"{middle}.resnets.1", f"{path}/block_1", shortcut=False),
            Entry(f"{middle}.attentions.0.norm.gamma", f"{path}/attention/norm/scale", GAIN2D),
            *linear(f"{middle}.attentions.0.to_qkv", f"{path}/attention/qkv", kernel=POINTWISE),
            *linear(f"{middle}.attentions.0.proj", f"{path}/attention/out", kernel=POINTWISE),
            Entry(f"{side}.norm_out.gamma", f"{side}/norm_out/scale", GAIN3D),
            *linear(f"{side}.conv_out", f"{side}/conv_out", kernel=CONV3D),
        ]
    down = [config.encoder_width * multiplier for multiplier in config.multipliers]
    up = [config.decoder_width * multiplier for multiplier in reversed(config.multipliers)]
    encoder, decoder = [config.encoder_width, *down], [up[0], *up]
    entries += _stages("encoder", encoder, config.blocks, config.halve_time, config.shortcuts)
    return entries + _stages("decoder", decoder, config.blocks + 1, config.halve_time[::-1], config.shortcuts)
