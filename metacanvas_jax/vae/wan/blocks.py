"""Building blocks of the Wan autoencoders. Time is causal everywhere, so a clip can be coded in chunks.

What a chunk needs of the frames before it is its ``Past``: the last input frames of every convolution over time. The
past of a clip's first chunk is empty and means zeros, which is the causal padding. A chunk that holds a whole clip
therefore needs no past, and any split into chunks gives the same numbers. Only resampling in time treats the first
frame of a clip differently: it stays one frame.

Sources: Wan-Video/Wan2.1 ``wan/modules/vae.py`` and Wan-Video/Wan2.2 ``wan/modules/vae2_2.py``; diffusers
``AutoencoderKLWan``, which keeps these frames in a list.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.attention import attention
from metacanvas_jax.nn.convolution import Conv
from metacanvas_jax.nn.layers import Dense, Dtype, ones_init
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.vae.base import per_frame

VIDEO = ("batch", "frames", "rows", "columns", None)
INSIDE = ((0, 0),) * 3  # no padding

Past = dict[str, Any]
"""Nested dict of the frames that a chunk remembers, by layer; empty before the first chunk."""


def remember(
    x: Float[Array, "b t h w c"], past: Float[Array, "b s h w c"] | None, length: int
) -> tuple[Float[Array, "b u h w c"], Float[Array, "b s h w c"]]:
    """The frames with ``length`` earlier ones (zeros if there is no past) in front, and the last ``length`` of all."""
    if past is None:
        x = jnp.pad(x, ((0, 0), (length, 0), (0, 0), (0, 0), (0, 0)))
    else:
        x = jnp.concatenate([past, x], axis=1)
    return x, x[:, x.shape[1] - length :]


def channel_norm(x: Float[Array, "*n c"], scale: Float[Array, " c"]) -> Float[Array, "*n c"]:
    """``x / max(|x|, 1e-12) * sqrt(c) * scale``, the norm taken in float32; keeps the dtype."""
    y = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
    y = (y / jnp.maximum(length, 1e-12)).astype(x.dtype) * x.shape[-1] ** 0.5
    return y * jnp.expand_dims(scale.astype(x.dtype), range(y.ndim - 1))


def fold(x: Float[Array, "b t h w i"], features: int, time: int, space: int, first: bool) -> Float[Array, "b T H W o"]:
    """The shortcut of a down step: frames, rows and columns folded behind the channel, then averaged in groups.

    The first chunk gets zero frames in front, which makes its first frame a pair.
    """
    if first:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = einops.rearrange(x, "b (t u) (h r) (w s) c -> b t h w (c u r s)", u=time, r=space, s=space)
    return jnp.mean(einops.rearrange(x, "b t h w (o g) -> b t h w o g", o=features), axis=-1)


def unfold(x: Float[Array, "b t h w i"], features: int, time: int, first: bool) -> Float[Array, "b T H W o"]:
    """The shortcut of an up step: channels repeated, then unfolded to frames, rows and columns.

    Only the last copy of the clip's first frame is kept.
    """
    x = jnp.repeat(x, features * time * 4 // x.shape[-1], axis=-1)
    x = einops.rearrange(x, "b t h w (c u r s) -> b (t u) (h r) (w s) c", u=time, r=2, s=2)
    return x[:, time - 1 :] if first else x


class ChannelNorm(nn.Module):
    """Scales every position to the same length, with a gain."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Keeps the dtype of the input."""
        return channel_norm(x, self.param("scale", nn.with_logical_partitioning(ones_init, (None,)), (x.shape[-1],)))


def conv3d(
    features: int, dtype: Dtype, axes: tuple[str | None, str | None] = (None, "embed"), name: str | None = None
) -> Conv:
    """3x3x3, zero padded in space; its two earlier frames come from ``remember``."""
    return Conv(features, (3, 3, 3), dtype, padding=((0, 0), (1, 1), (1, 1)), axes=axes, name=name)


class ResidualBlock(nn.Module):
    """Residual block: norm, SiLU, causal convolution, twice; a linear shortcut where the width changes."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], past: Past) -> tuple[Float[Array, "b t h w o"], Past]:
        """Keeps the size."""
        y, now = x, {}
        for i in (1, 2):
            y = jax.nn.silu(ChannelNorm(name=f"norm{i}")(y))
            y, now[f"conv{i}"] = remember(y, past.get(f"conv{i}"), 2)
            y = conv3d(self.features, self.dtype, name=f"conv{i}")(y)
        if x.shape[-1] != self.features:
            x = Dense(self.features, (None, "embed"), self.dtype, name="shortcut")(x)
        return constrain(x + y, VIDEO), now


class SelfAttention(nn.Module):
    """Every position of a frame attends to that frame, with one head as wide as the frame has channels."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Frames, one by one; adds to its input."""
        y = einops.rearrange(ChannelNorm(name="norm")(x), "b h w c -> b (h w) 1 c")
        qkv = Dense(3 * x.shape[-1], (None, "embed"), self.dtype, name="qkv")(y)
        y = Dense(x.shape[-1], (None, "embed"), self.dtype, name="out")(attention(*jnp.split(qkv, 3, axis=-1)))
        return x + einops.rearrange(y, "b (h w) 1 c -> b h w c", h=x.shape[1])


class Middle(nn.Module):
    """Block, attention, block, at the smallest size."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], past: Past) -> tuple[Float[Array, "b t h w c"], Past]:
        """Keeps size and width."""
        now = {}
        x, now["block_0"] = ResidualBlock(x.shape[-1], self.dtype, name="block_0")(x, past.get("block_0", {}))
        x = per_frame(SelfAttention(self.dtype, name="attention"), x)
        x, now["block_1"] = ResidualBlock(x.shape[-1], self.dtype, name="block_1")(x, past.get("block_1", {}))
        return x, now


class Down(nn.Module):
    """Halves rows and columns, then, with ``time``, the frames after the first one of the clip."""

    time: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], past: Past) -> tuple[Float[Array, "b T H W c"], Past]:
        """``1 + 2 k`` frames of the first chunk become ``1 + k``, ``2 k`` of a later one ``k``."""
        width, axes = x.shape[-1], (None, "embed")
        # Zeros on the right and at the bottom only.
        x = per_frame(Conv(width, (3, 3), self.dtype, (2, 2), ((0, 1), (0, 1)), axes=axes, name="space"), x)
        if not self.time:
            return x, {}
        conv = Conv(width, (3, 1, 1), self.dtype, (2, 1, 1), INSIDE, axes=axes, name="time")
        if past:
            x, last = remember(x, past["time"], 1)
            return conv(x), {"time": last}
        return jnp.concatenate([x[:, :1], conv(x)], axis=1), {"time": x[:, -1:]}


class Up(nn.Module):
    """Doubles, with ``time``, the frames after the first one of the clip; then rows and columns, of ``features``."""

    features: int
    time: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], past: Past) -> tuple[Float[Array, "b T H W o"], Past]:
        """``1 + k`` frames of the first chunk become ``1 + 2 k``, ``k`` of a later one ``2 k``."""
        width, axes, now = x.shape[-1], (None, "embed"), {}
        if self.time:
            # The clip's first frame is passed on, and the frames after it do not read it: their past begins with zeros.
            start = 0 if past else 1
            y, now["time"] = remember(x[:, start:], past.get("time"), 2)
            y = Conv(2 * width, (3, 1, 1), self.dtype, padding=INSIDE, axes=axes, name="time")(y)
            y = einops.rearrange(y, "b t h w (u c) -> b (t u) h w c", u=2)
            x = jnp.concatenate([x[:, :start], y], axis=1)
        return per_frame(Conv(self.features, (3, 3), self.dtype, axes=axes, doubled=True, name="space"), x), now


class Stage(nn.Module):
    """Some blocks, then a step ``down``, ``up`` or none; ``shortcut`` adds the resampled input to the output.

    Without it a step ``up`` halves the channels.
    """

    features: int
    blocks: int
    step: str
    time: bool
    shortcut: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], past: Past) -> tuple[Float[Array, "b T H W o"], Past]:
        """Runs one chunk."""
        start, now = x, {}
        for j in range(self.blocks):
            name = f"block_{j}"
            x, now[name] = ResidualBlock(self.features, self.dtype, name=name)(x, past.get(name, {}))
        factor = 2 if self.time else 1
        if self.step == "down":
            x, now["down"] = Down(self.time, self.dtype, name="down")(x, past.get("down", {}))
        elif self.step == "up":
            features = self.features if self.shortcut else self.features // 2
            x, now["up"] = Up(features, self.time, self.dtype, name="up")(x, past.get("up", {}))
        if self.shortcut and self.step == "up":
            x = x + unfold(start, self.features, factor, first=not past)
        elif self.shortcut:
            x = x + fold(start, self.features, factor, 2 if self.step == "down" else 1, first=not past)
        return constrain(x, VIDEO), now
