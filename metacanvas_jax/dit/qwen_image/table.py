"""Weights of Qwen-Image: diffusers ``QwenImageTransformer2DModel`` (folder ``transformer`` of its pipelines)."""

from metacanvas_jax.dit import joint_names
from metacanvas_jax.dit.qwen_image.network import QwenImageConfig
from metacanvas_jax.weights.table import LINEAR, SAME, Entry, half_split, linear, then

IMAGE = joint_names.IMAGE | {"modulation": "img_mod.1", "up": "img_mlp.net.0.proj", "down": "img_mlp.net.2"}
TEXT = joint_names.TEXT | {"modulation": "txt_mod.1", "up": "txt_mlp.net.0.proj", "down": "txt_mlp.net.2"}


def table(config: QwenImageConfig) -> list[Entry]:
    """Every published tensor of the network, paths relative to its own parameters."""
    entries = [
        *linear("img_in", "patch_in"),
        Entry("txt_norm.weight", "context_norm/scale", SAME),
        *linear("txt_in", "context"),
        *linear("time_text_embed.timestep_embedder.linear_1", "time/fc1"),
        *linear("time_text_embed.timestep_embedder.linear_2", "time/fc2"),
        *linear("norm_out.linear", "modulation"),
        *linear("proj_out", "out"),
    ]
    split, layers = half_split(config.head_width), config.layers
    for stream, names in (("image", IMAGE), ("text", TEXT)):
        published = {ours: f"transformer_blocks.{{i}}.{theirs}" for ours, theirs in names.items()}
        for part in ("q", "k"):  # from interleaved pairs to half-split heads
            path = f"blocks/{stream}/attention/{part}"
            entries += linear(published[part], path, layers, then(LINEAR, split), split)
            entries.append(Entry(f"{published[f'{part}_norm']}.weight", f"{path}_norm/scale", split, layers))
        entries += linear(published["v"], f"blocks/{stream}/attention/v", layers)
        for part in ("modulation", "out", "up", "down"):
            entries += linear(published[part], f"blocks/{stream}/{part}", layers)
    return entries
