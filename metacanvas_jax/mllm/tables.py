"""Entries of weight tables that the MLLMs share: the decoder, and layers that vision towers have in common.

Files name the two halves of an MLLM ``model.*`` and ``visual.*``, or ``model.language_model.*`` and ``model.visual.*``.
Releases of transformers differ in this, and so do the names of a module in memory and of a file. Both are read.
"""

from collections.abc import Sequence

import numpy as np
from einops import rearrange

from metacanvas_jax.mllm.decoder import DecoderConfig
from metacanvas_jax.weights.table import LINEAR, SAME, Box, Entry, Transform


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


def patch_kernel(channels: int, temporal_patch: int, patch: int) -> Transform:
    """The kernel of a convolution whose stride is its size, ``[out c t h w]``, as a matrix ``[(c t h w) out]``."""
    sides = {"c": channels, "t": temporal_patch, "h": patch, "w": patch}

    def forward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "o c t h w -> (c t h w) o")

    def backward(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "(c t h w) o -> o c t h w", **sides)

    return Transform(forward, backward)


def halves(name: str, path: str, transform: Transform, layers: int | None, prefixes: Sequence[str]) -> Entry:
    """An entry for a tensor that files name with one of several prefixes, the published one first."""
    published, *others = (f"{prefix}{name}" for prefix in prefixes)
    return Entry(published, path, transform, layers, tuple(others))


def language_table(config: DecoderConfig, prefixes: Sequence[str]) -> list[Entry]:
    """Entries of the decoder; its adapters have no published tensors. See ``halves`` for ``prefixes``."""

    def entry(name: str, path: str, transform: Transform, layers: int | None = None) -> Entry:
        return halves(name, f"language/{path}", transform, layers, prefixes)

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
        if config.qk_norm and name != "v":
            norm = f"layers.{{i}}.self_attn.{name}_norm.weight"
            entries.append(entry(norm, f"layers/{name}_norm/scale", SAME, config.layers))
    for name in ("gate", "up", "down"):
        entries.append(entry(f"layers.{{i}}.mlp.{name}_proj.weight", f"layers/{name}/kernel", LINEAR, config.layers))
    if not config.tied:
        entries.append(Entry("lm_head.weight", "language/head/kernel", LINEAR))
    return entries
