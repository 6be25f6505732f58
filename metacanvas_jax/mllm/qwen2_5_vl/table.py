"""Published tensors of Qwen2.5-VL (and of text decoders of the same family) as parameters of ``mllm.qwen.Qwen25VL``.

Files on the hub name the two halves ``model.*`` and ``visual.*``; modules of transformers 5 in memory, and files saved
from their state dict, name them ``model.language_model.*`` and ``model.visual.*``. Both are read.
"""

import numpy as np
from einops import rearrange

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.weights.table import LINEAR, SAME, Box, Entry, Transform, then


def fused_by_head(heads: int, width: int) -> Transform:
    """Output channels of a fused qkv projection from (q k v, heads, width) to (heads, q k v, width).

    ``width`` is that of all heads together. A slice of the result holds whole heads, so the projection can be sharded
    over them; in the published order they lie apart, so the channels are read whole and only other axes are cut.
    """

    def forward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "... (s h e) -> ... (h s e)", s=3, h=heads)

    def backward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "... (h s e) -> ... (s h e)", s=3, h=heads)

    def window(box: Box) -> tuple[Box, Box]:
        channels = (*box[:-1], (0, 3 * width))
        return channels, channels

    return Transform(forward, backward, window)


def patch_kernel(config: VisionConfig) -> Transform:
    """The kernel of a convolution whose stride is its size, ``[out c t h w]``, as a matrix ``[(c t h w) out]``."""
    sides = {"c": config.in_channels, "t": config.temporal_patch, "h": config.patch, "w": config.patch}

    def forward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "o c t h w -> (c t h w) o")

    def backward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "(c t h w) o -> o c t h w", **sides)

    return Transform(forward, backward)


def language_table(config: LanguageConfig) -> list[Entry]:
    """Entries of the decoder; its adapters have no published tensors."""

    def entry(name: str, path: str, transform: Transform, layers: int | None = None) -> Entry:
        return Entry(f"model.{name}", f"language/{path}", transform, layers, (f"model.language_model.{name}",))

    entries = [
        entry("embed_tokens.weight", "embedding/table", SAME),
        entry("norm.weight", "norm/scale", SAME),
        entry("layers.{i}.input_layernorm.weight", "layers/attention_norm/scale", SAME, config.layers),
        entry("layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale", SAME, config.layers),
        entry("layers.{i}.self_attn.o_proj.weight", "layers/o/kernel", LINEAR, config.layers),
    ]
    for name in ("q", "k", "v"):
        published = f"layers.{{i}}.self_attn.{name}_proj"
        entries.append(entry(f"{published}.weight", f"layers/{name}/kernel", LINEAR, config.layers))
        if config.qkv_bias:
            entries.append(entry(f"{published}.bias", f"layers/{name}/bias", SAME, config.layers))
    for name in ("gate", "up", "down"):
        entries.append(entry(f"layers.{{i}}.mlp.{name}_proj.weight", f"layers/{name}/kernel", LINEAR, config.layers))
    if not config.tied:
        entries.append(Entry("lm_head.weight", "language/head/kernel", LINEAR))
    return entries


def vision_table(config: VisionConfig) -> list[Entry]:
    """Entries of the vision tower."""

    def entry(name: str, path: str, transform: Transform, layers: int | None = None) -> Entry:
        return Entry(f"visual.{name}", f"vision/{path}", transform, layers, (f"model.visual.{name}",))

    by_head = fused_by_head(config.heads, config.width)
    entries = [
        entry("patch_embed.proj.weight", "patch/kernel", patch_kernel(config)),
        entry("blocks.{i}.norm1.weight", "layers/attention_norm/scale", SAME, config.depth),
        entry("blocks.{i}.norm2.weight", "layers/mlp_norm/scale", SAME, config.depth),
        entry("blocks.{i}.attn.qkv.weight", "layers/qkv/kernel", then(LINEAR, by_head), config.depth),
        entry("blocks.{i}.attn.qkv.bias", "layers/qkv/bias", by_head, config.depth),
        entry("merger.ln_q.weight", "merger/norm/scale", SAME),
    ]
    linears = {"attn.proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
    for published, path in linears.items():
        entries.append(entry(f"blocks.{{i}}.{published}.weight", f"layers/{path}/kernel", LINEAR, config.depth))
        entries.append(entry(f"blocks.{{i}}.{published}.bias", f"layers/{path}/bias", SAME, config.depth))
    for published, path in {"mlp.0": "up", "mlp.2": "down"}.items():
        entries.append(entry(f"merger.{published}.weight", f"merger/{path}/kernel", LINEAR))
        entries.append(entry(f"merger.{published}.bias", f"merger/{path}/bias", SAME))
    return entries


def table(config: MllmConfig) -> list[Entry]:
    """Every published tensor of the model."""
    return language_table(config.language) + ([] if config.vision is None else vision_table(config.vision))
