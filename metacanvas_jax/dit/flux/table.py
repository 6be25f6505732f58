"""Weights of FLUX.1 transformers: diffusers ``FluxTransformer2DModel`` (folder ``transformer`` of its pipelines)."""

import dataclasses

from metacanvas_jax.dit import joint_names
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.weights.table import LINEAR, Entry, folded, half_split, linear, then

MLP = (("linear_1", "fc1"), ("linear_2", "fc2"))
IMAGE = joint_names.IMAGE | {"modulation": "norm1.linear", "up": "ff.net.0.proj", "down": "ff.net.2"}
TEXT = joint_names.TEXT | {
    "modulation": "norm1_context.linear",
    "up": "ff_context.net.0.proj",
    "down": "ff_context.net.2",
}


def table(config: FluxConfig) -> list[Entry]:
    """Every published tensor of the network, paths relative to its own parameters."""
    double, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    entries = [
        *linear("x_embedder", "patch_in"),
        *linear("context_embedder", "context"),
        *linear("norm_out.linear", "modulation"),
        *linear("proj_out", "out"),
    ]
    for name, path in (("timestep", "time"), ("guidance", "guidance"), ("text", "pooled")):
        if path != "guidance" or config.guidance:
            for theirs, ours in MLP:
                entries += linear(f"time_text_embed.{name}_embedder.{theirs}", f"{path}/{ours}")
    for stream, names in (("image", IMAGE), ("text", TEXT)):
        entries += heads(double, f"double/{stream}", names, config.layers_double, config.head_width)
        for part in ("modulation", "out", "up", "down"):
            entries += linear(f"{double}.{names[part]}", f"double/{stream}/{part}", config.layers_double)
    entries += heads(single, "single", IMAGE, config.layers_single, config.head_width)
    entries += linear(f"{single}.norm.linear", "single/modulation", config.layers_single)
    up, up_bias = then(LINEAR, folded(1, config.mlp_ratio, config.width)), folded(0, config.mlp_ratio, config.width)
    entries += linear(f"{single}.proj_mlp", "single/up", config.layers_single, up, up_bias)
    joined = then(LINEAR, folded(0, 1 + config.mlp_ratio, config.width))
    kernel, bias = linear(f"{single}.proj_out", "single/out", config.layers_single, joined)
    return [*entries, dataclasses.replace(kernel, adapter=(joined, LINEAR)), bias]


def fresh(config: FluxConfig) -> list[str]:
    """Parameters that no published folder holds; they start at zero, which leaves the published behaviour alone."""
    return ["pool/kernel", "pool/bias"] if config.pooled == "learned" else []


def heads(block: str, path: str, names: dict[str, str], layers: int, head_width: int) -> list[Entry]:
    """Projections and norms of one attention; q and k go from interleaved pairs to half-split heads."""
    split = half_split(head_width)
    return [
        *linear(f"{block}.{names['q']}", f"{path}/attention/q", layers, then(LINEAR, split), split),
        *linear(f"{block}.{names['k']}", f"{path}/attention/k", layers, then(LINEAR, split), split),
        *linear(f"{block}.{names['v']}", f"{path}/attention/v", layers),
        Entry(f"{block}.{names['q_norm']}.weight", f"{path}/attention/q_norm/scale", split, layers),
        Entry(f"{block}.{names['k_norm']}.weight", f"{path}/attention/k_norm/scale", split, layers),
    ]


def added(config: FluxConfig) -> list[Entry]:
    """Tensors of the layer that pools the text states, which the published network does not have."""
    return linear("pool", "pool") if config.pooled == "learned" else []
