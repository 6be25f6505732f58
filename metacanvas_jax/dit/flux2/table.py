"""Weights of FLUX.2 transformers: diffusers ``Flux2Transformer2DModel`` (folder ``transformer`` of its pipelines).

The fused layers of the single blocks are rearranged as a whole: every head of queries, keys and values, and every run
of ``head_width`` hidden units, goes from interleaved pairs to half-split halves. The layer after them reads its inputs
in the same order, so only the rotation of queries and keys notices.
"""

import dataclasses

from metacanvas_jax.dit import joint_names
from metacanvas_jax.dit.flux2.network import Flux2Config
from metacanvas_jax.weights.table import LINEAR, Entry, folded, half_split, linear, then

IMAGE = joint_names.IMAGE | {"up": "ff.linear_in", "down": "ff.linear_out"}
TEXT = joint_names.TEXT | {"up": "ff_context.linear_in", "down": "ff_context.linear_out"}
PLAIN = {
    "x_embedder": "patch_in",
    "context_embedder": "context",
    "time_guidance_embed.timestep_embedder.linear_1": "time/fc1",
    "time_guidance_embed.timestep_embedder.linear_2": "time/fc2",
    "double_stream_modulation_img.linear": "modulation_image",
    "double_stream_modulation_txt.linear": "modulation_text",
    "single_stream_modulation.linear": "modulation_single",
    "norm_out.linear": "modulation",
    "proj_out": "out",
}


def table(config: Flux2Config) -> list[Entry]:
    """Every published tensor of the network, paths relative to its own parameters."""
    width, ratio, split = config.width, config.mlp_ratio, half_split(config.head_width)
    entries = [entry for theirs, ours in PLAIN.items() for entry in linear(theirs, ours, bias=None)]
    double, single, layers = "transformer_blocks.{i}", "single_transformer_blocks.{i}.attn", config.layers_double
    for stream, names in (("image", IMAGE), ("text", TEXT)):
        published = {ours: f"{double}.{theirs}" for ours, theirs in names.items()}
        path = f"double/{stream}"
        for part in ("q", "k"):
            entries += linear(published[part], f"{path}/attention/{part}", layers, then(LINEAR, split), None)
            norm = Entry(f"{published[f'{part}_norm']}.weight", f"{path}/attention/{part}_norm/scale", split, layers)
            entries.append(norm)
        entries += linear(published["v"], f"{path}/attention/v", layers, bias=None)
        up = then(LINEAR, folded(1, 2, ratio * width))
        entries += linear(published["up"], f"{path}/up", layers, up, None)
        for part in ("out", "down"):
            entries += linear(published[part], f"{path}/{part}", layers, bias=None)
    layers = config.layers_single
    for part in ("q", "k"):
        entries.append(Entry(f"{single}.norm_{part}.weight", f"single/{part}_norm/scale", split, layers))
    before = then(then(LINEAR, split), folded(1, 3 + 2 * ratio, width))
    after = then(split, then(LINEAR, folded(0, 1 + ratio, width)))
    entries += linear(f"{single}.to_qkv_mlp_proj", "single/qkv_up", layers, before, None)
    (out,) = linear(f"{single}.to_out", "single/out", layers, after, None)
    return [*entries, dataclasses.replace(out, adapter=(after, LINEAR))]
