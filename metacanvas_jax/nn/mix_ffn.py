"""SANA's Mix-FFN: a gated feed-forward with a depthwise 3x3 convolution between its two projections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype, zeros_init


def depthwise_conv(
    x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"], bias: Float[Array, " c"] | None = None
) -> Float[Array, "b y x c"]:
    """Convolves every channel with its own odd-sized kernel, zero padded, as in torch (no flip).

    Written as shifted multiply-adds, which every backend fuses into one pass over memory; a grouped convolution with
    one channel per group has a gradient that some backends (XLA:CPU) run many times slower than its forward.
    """
    rows, columns, _ = kernel.shape
    _, y, x_, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    out = jnp.zeros_like(x) if bias is None else jnp.broadcast_to(bias, x.shape)
    for i in range(rows):
        for j in range(columns):
            out = out + padded[:, i : i + y, j : j + x_] * kernel[None, None, None, i, j]
    return out


class MixFFN(nn.Module):
    """1x1 to ``2 * hidden``, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 back; no norm and no residual inside.

    Source: diffusers ``GLUMBConv``; the expanded SiLU acts on all channels, the value half stands first, the last
    projection has no bias.
    """

    features: int
    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b y x d"]) -> Float[Array, "b y x o"]:
        """Tokens on their grid."""
        y = jax.nn.silu(Dense(2 * self.hidden, ("embed", "mlp"), self.dtype, name="expand")(x))
        y = nn.with_logical_constraint(y, ("batch", "seq", None, "mlp"))
        y = DepthwiseConv(self.dtype, name="depth")(y)
        value, gate = jnp.split(y, 2, axis=-1)
        return Dense(self.features, ("mlp", "embed"), self.dtype, use_bias=False, name="reduce")(
            value * jax.nn.silu(gate)
        )


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias; kernel ``[size size c]``."""

    dtype: Dtype
    size: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """Zero padded, the grid keeps its size."""
        shape = (self.size, self.size, x.shape[-1])
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=())
        kernel = self.param("kernel", nn.with_logical_partitioning(init, (None, None, "mlp")), shape)
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, ("mlp",)), shape[-1:])
        return depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))
