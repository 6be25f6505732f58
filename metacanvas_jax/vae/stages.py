"""The stages of image autoencoders: residual blocks with group norm, attention at the smallest size.

Source: diffusers ``models/autoencoders/vae.py``, ``Encoder`` and ``Decoder``.
"""

from typing import Protocol, runtime_checkable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.attention import attention
from metacanvas_jax.nn.convolution import Conv
from metacanvas_jax.nn.layers import Dense, Dtype, ones_init, zeros_init
from metacanvas_jax.parallel.activations import constrain

IMAGE = ("batch", "rows", "columns", None)
EPS = 1e-6


@runtime_checkable
class Stages(Protocol):
    """What encoder and decoder read of the config of their network."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Widths of the stages from the shallowest; each has half the size."""
        ...

    @property
    def blocks(self) -> int:
        """Residual blocks of an encoder stage; a decoder stage has one more."""
        ...

    @property
    def means(self) -> int:
        """Channels of the posterior's mean."""
        ...

    @property
    def groups(self) -> int:
        """Groups of a norm."""
        ...

    @property
    def dtype(self) -> Dtype:
        """Dtype of the computation."""
        ...


def group_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, eps: float
) -> Float[Array, "b h w c"]:
    """Normalises every group of consecutive channels over the whole image, in float32; keeps the dtype."""
    size = x.shape[-1] // groups

    def mean(y: jax.Array) -> jax.Array:
        # Of every channel first: a sum over both at once is four times slower on a CPU, and less exact.
        channels = jnp.mean(y, axis=(1, 2)).reshape(-1, groups, size)
        return jnp.repeat(jnp.mean(channels, axis=-1), size, axis=-1)[:, None, None]

    y = x.astype(jnp.float32)
    y = y - mean(y)
    y = y * jax.lax.rsqrt(mean(y * y) + eps)
    return (y * scale.astype(jnp.float32)[None, None, None] + bias.astype(jnp.float32)[None, None, None]).astype(
        x.dtype
    )


class GroupNorm(nn.Module):
    """Group norm with gain and bias."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(ones_init, (None,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, (None,)), (x.shape[-1],))
        return group_norm(x, scale, bias, self.groups, EPS)


class ResidualBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, twice; a 1x1 shortcut where the width changes."""

    features: int
    config: Stages

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Keeps the size."""
        groups, dtype, axes = self.config.groups, self.config.dtype, (None, "embed")
        y = jax.nn.silu(GroupNorm(groups, name="norm1")(x))
        y = Conv(self.features, (3, 3), dtype, axes=axes, name="conv1")(y)
        y = jax.nn.silu(GroupNorm(groups, name="norm2")(y))
        y = Conv(self.features, (3, 3), dtype, axes=axes, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Dense(self.features, axes, dtype, name="shortcut")(x)
        return constrain(x + y, IMAGE)


class SelfAttention(nn.Module):
    """Every position attends to all others, with one head as wide as the image has channels."""

    config: Stages

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Adds to its input."""
        width, dtype, axes = x.shape[-1], self.config.dtype, (None, "embed")
        y = einops.rearrange(GroupNorm(self.config.groups, name="norm")(x), "b h w c -> b (h w) 1 c")
        q, k, v = (Dense(width, axes, dtype, name=name)(y) for name in ("q", "k", "v"))
        y = Dense(width, axes, dtype, name="out")(attention(q, k, v))
        return x + einops.rearrange(y, "b (h w) 1 c -> b h w c", h=x.shape[1])


class Middle(nn.Module):
    """Block, attention, block, at the smallest size."""

    config: Stages

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Keeps size and width."""
        x = ResidualBlock(x.shape[-1], self.config, name="block_0")(x)
        x = SelfAttention(self.config, name="attention")(x)
        return ResidualBlock(x.shape[-1], self.config, name="block_1")(x)


class Encoder(nn.Module):
    """Pixels to the mean and the log-variance of the posterior, concatenated along the channels."""

    config: Stages

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1]."""
        config, dtype = self.config, self.config.dtype
        x = Conv(config.channels[0], (3, 3), dtype, axes=(None, "embed"), name="conv_in")(x)
        for i, width in enumerate(config.channels):
            for j in range(config.blocks):
                x = ResidualBlock(width, config, name=f"stages_{i}_block_{j}")(x)
            if i < len(config.channels) - 1:  # zeros on the right and at the bottom only
                down = Conv(width, (3, 3), dtype, (2, 2), ((0, 1), (0, 1)), axes=(None, "embed"), name=f"down_{i}")
                x = down(x)
        x = Middle(config, name="middle")(x)
        x = jax.nn.silu(GroupNorm(config.groups, name="norm_out")(x))
        return Conv(2 * config.means, (3, 3), dtype, axes=("embed", None), name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels; stage 0 is the deepest."""

    config: Stages

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w 3"]:
        """Latents in the network's own scale."""
        config, dtype = self.config, self.config.dtype
        x = Conv(config.channels[-1], (3, 3), dtype, axes=(None, "embed"), name="conv_in")(x)
        x = Middle(config, name="middle")(x)
        for i, width in enumerate(reversed(config.channels)):
            for j in range(config.blocks + 1):
                x = ResidualBlock(width, config, name=f"stages_{i}_block_{j}")(x)
            if i < len(config.channels) - 1:
                x = Conv(width, (3, 3), dtype, axes=(None, "embed"), doubled=True, name=f"up_{i}")(x)
        x = jax.nn.silu(GroupNorm(config.groups, name="norm_out")(x))
        return Conv(3, (3, 3), dtype, axes=("embed", None), name="conv_out")(x)
