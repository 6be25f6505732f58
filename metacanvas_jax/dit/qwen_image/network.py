"""Qwen-Image and Qwen-Image-Edit: double-stream blocks over one joint sequence.

Sequence: ``[text | target | reference 1 | reference 2 ...]``. Rotary positions have three axes (image, row, column).
Image ``i`` (the target is image 0) has ``i`` on the first axis, and rows and columns that are centred: ``h`` rows have
the positions ``-(h - h // 2)`` to ``h // 2 - 1``. Text state ``j`` has ``s + j`` on all three axes, where ``s`` is half
of the longest side of any image. Sources: "Qwen-Image Technical Report" (arXiv 2508.02324); diffusers 0.42.1
``models/transformers/transformer_qwenimage.py`` and ``pipelines/qwenimage``.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float

from metacanvas_jax.dit.double_stream import (
    EPS,
    PROJECTIONS,
    Parts,
    Rotation,
    Stream,
    attend_jointly,
)
from metacanvas_jax.dit.packed import PackedDiT
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm
from metacanvas_jax.nn.lora import LoraConfig, check_targets
from metacanvas_jax.nn.modulation import TimeEmbed
from metacanvas_jax.nn.rope import grid_rotation, inverse_frequencies
from metacanvas_jax.nn.stack import Remat, entering, stack
from metacanvas_jax.types import Given, States, Tokens


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """Shape of a Qwen-Image transformer; the defaults are the published sizes.

    With ``zero_cond_t`` tokens of references are modulated as at noise level 0, which they have (Qwen-Image-Edit-2511);
    otherwise as the target's. ``lora`` adds adapters, without dropout, to the layers of both streams that it targets
    (of ``double_stream.PROJECTIONS``).
    """

    latent_channels: int = 16
    layers: int = 60
    heads: int = 24
    head_width: int = 128
    mlp_ratio: int = 4
    context_width: int = 3584
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10000.0
    zero_cond_t: bool = False
    lora: LoraConfig | None = None
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on fields that do not fit together."""
        if sum(self.rope_axes) != self.head_width or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} must be even and sum to head_width {self.head_width}")
        check_targets(self.lora, PROJECTIONS, "QwenImageConfig")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_width


def qwen_image(**changes: Any) -> QwenImageConfig:
    """Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-2509: one network of 20.4 B parameters, three trainings."""
    return dataclasses.replace(QwenImageConfig(), **changes)


def qwen_image_edit_2511(**changes: Any) -> QwenImageConfig:
    """Qwen-Image-Edit-2511: the same network, with references modulated at noise level 0."""
    return dataclasses.replace(QwenImageConfig(zero_cond_t=True), **changes)


def centred(size: int) -> np.ndarray:
    """Positions of the rows (or columns) of an image."""
    return np.arange(size) - (size - size // 2)


def image_rotation(config: QwenImageConfig, images: tuple[tuple[int, int], ...]) -> Rotation:
    """Cosines and sines ``[1 n f]`` of images of the given (rows, columns) of tokens, one after the other."""
    tables = [
        grid_rotation((np.array([i]), centred(rows), centred(columns)), config.rope_axes, config.theta)
        for i, (rows, columns) in enumerate(images)
    ]
    cos, sin = zip(*tables, strict=True)
    return jnp.concatenate(cos, axis=1), jnp.concatenate(sin, axis=1)


def text_rotation(config: QwenImageConfig, text: States, images: tuple[tuple[int, int], ...]) -> Rotation:
    """Cosines and sines ``[b l f]`` of text states; those whose mask is False, wherever they are, are not counted."""
    start = max(side // 2 for image in images for side in image)
    positions = start + np.arange(text.states.shape[1], dtype=np.float64)
    angles = np.concatenate([np.outer(positions, inverse_frequencies(w, config.theta)) for w in config.rope_axes], 1)
    cos, sin = (jnp.asarray(table, jnp.float32)[None] for table in (np.cos(angles), np.sin(angles)))
    if text.mask is None:
        return cos, sin
    index = jnp.maximum(jnp.cumsum(text.mask, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take(cos[0], index, axis=0), jnp.take(sin[0], index, axis=0)


class Block(nn.Module):
    """Text and image streams with separate weights and one joint attention, text first."""

    config: QwenImageConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b l d"], Float[Array, "b n d"]],
        vector: Float[Array, "b d"],
        still: Float[Array, "b d"] | None,
        is_reference: Bool[Array, " n"],
        rotations: tuple[Rotation, Rotation],
        mask: Bool[Array, "b m"] | None,
    ) -> tuple[tuple[Float[Array, "b l d"], Float[Array, "b n d"]], None]:
        """Maps (text, image) to (text, image). ``still`` modulates the references, where it is not None."""
        lora = self.config.lora
        text, image = Stream(self.config, lora, name="text"), Stream(self.config, lora, name="image")
        parts = image.modulations(vector)
        if still is not None:
            parts = per_token(is_reference, image.modulations(still), parts)
        both = (text.modulations(vector), parts)
        return attend_jointly((text, image), entering(streams), both, rotations, mask), None


def per_token(chosen: Bool[Array, " n"], yes: Parts, no: Parts) -> Parts:
    """Modulation ``[b n d]`` by tokens: ``yes`` where ``chosen``, else ``no``, both of them per sample."""
    return [jnp.where(chosen[None, :, None], y[:, None], n[:, None]) for y, n in zip(yes, no, strict=True)]


@struct.dataclass
class Carried:
    """``Tokens.private`` of Qwen-Image: embeddings of the noise level and of level 0; tokens of each reference."""

    vector: Any  # Float[Array, "b d"], or what a map over the tree puts in its place
    still: Any  # the same at noise level 0; None where nothing reads it
    references: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (rows, columns)


class QwenImage(PackedDiT):
    """The velocity network. Images only: ``t`` is 1."""

    config: QwenImageConfig

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        width, dtype = config.width, config.dtype
        self.patch_in = Dense(width, (None, "embed"), dtype)
        self.context_norm = RMSNorm(EPS, None)
        self.context = Dense(width, (None, "embed"), dtype)
        self.time = TimeEmbed(width, dtype)
        self.blocks = stack(Block, config.layers, remat=config.remat, inputs=5)(config)
        self.modulation = Dense(2 * width, ("embed", None), dtype)
        self.out = Dense(4 * config.latent_channels, ("embed", None), dtype)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Packs and projects the noisy latents and the reference images, which may have any even size."""
        self.refuse(given, "channels", "pooled", "guidance")
        grid, reference, sizes = self.packed(latents, time, text, given)
        still = self._vector(jnp.zeros_like(time)) if self.config.zero_cond_t and sizes else None
        private = Carried(self._vector(time), still, sizes)
        return Tokens(grid=grid, time=time, reference=reference, private=private)

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """The blocks over text, target and reference tokens."""
        _, _, rows, columns, _ = tokens.grid.shape
        count, images = rows * columns, ((rows, columns), *tokens.private.references)
        image = rearrange(tokens.grid, "b 1 h w d -> b (h w) d")
        if tokens.reference is not None:
            image = jnp.concatenate([image, tokens.reference], axis=1)
        rotations = text_rotation(self.config, text, images), image_rotation(self.config, images)
        mask = None
        if text.mask is not None:
            mask = jnp.concatenate([text.mask, jnp.ones(image.shape[:2], bool)], axis=1)
        context = self.context(self.context_norm(text.states.astype(self.config.dtype)))
        is_reference = jnp.arange(image.shape[1]) >= count
        vector, still = tokens.private.vector, tokens.private.still
        (_, image), _ = self.blocks((context, image), vector, still, is_reference, rotations, mask)
        grid = rearrange(image[:, :count], "b (h w) d -> b 1 h w d", h=rows)
        return tokens.replace(grid=grid, reference=None if tokens.reference is None else image[:, count:])

    def _vector(self, time: Float[Array, " b"]) -> Float[Array, "b d"]:
        return self.time(1000.0 * time.astype(jnp.float32))
