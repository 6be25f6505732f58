"""Mix-FFN: a gated feed-forward with a depthwise 3x3 convolution between its two projections."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metacanvas_jax.nn.gating import silu, silu_gated
from metacanvas_jax.nn.layers import Dense, Dtype, zeros_init
from metacanvas_jax.nn.lora import LoraConfig, adapted
from metacanvas_jax.nn.precision import stored
from metacanvas_jax.nn.stack import hidden_units
from metacanvas_jax.parallel.activations import constrain_grid


def depthwise_conv(
    x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"], bias: Float[Array, " c"] | None = None
) -> Float[Array, "b y x c"]:
    """Convolves every channel with its own odd-sized kernel, zero padded, as in torch (no flip).

    It is a sum of shifted products in float32, rounded once, which every backend fuses into one pass over memory. On
    XLA:CPU a grouped convolution with one channel per group is tens of times slower, and its gradient is slower still.
    """
    y = _depthwise(x, kernel)
    return y if bias is None else y + bias[None, None, None]


def _taps(x: Float[Array, "b y x c"], rows: int, columns: int) -> list[Float[Array, "b y x c"]]:
    """One shifted copy of the input for each cell of the kernel, row by row."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    return [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]


def _weighted(x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"]) -> Float[Array, "b y x c"]:
    return jax.lax.platform_dependent(x, kernel, cpu=_kept, default=_at_once)


def _at_once(x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"]) -> Float[Array, "b y x c"]:
    rows, columns, _ = kernel.shape
    weights = jnp.expand_dims(kernel.astype(jnp.float32).reshape(rows * columns, -1), (1, 2, 3))
    terms = (tap.astype(jnp.float32) * weight for tap, weight in zip(_taps(x, rows, columns), weights, strict=True))
    return sum(terms).astype(x.dtype)


def _kept(x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"]) -> Float[Array, "b y x c"]:
    # XLA:CPU would fuse this sum into each of its consumers, up to five, and compute it once in each. It stores the
    # result of a conditional, so the sum is put into a branch that is always taken. The compiler cannot simplify the
    # condition.
    first = jax.lax.bitcast_convert_type(kernel.astype(jnp.float32)[0, 0, 0], jnp.int32)
    always = jnp.minimum(jnp.abs(first), 0) <= 0
    return jax.lax.cond(always, _at_once, lambda x, _: jnp.zeros_like(x), x, kernel)


# The derivative is written by hand. Automatic differentiation would turn every slice into a padded copy and sum nine of
# these copies in nine passes over memory.
_depthwise = jax.custom_vjp(lambda x, kernel: _weighted(stored(x), kernel))


def _forward(x: Float[Array, "b y x c"], kernel: Float[Array, "r s c"]):
    x = stored(x)
    return _weighted(x, kernel), (x, kernel)


def _kernel_gradient(x: Float[Array, "b y x c"], dy: Float[Array, "b y x c"], size: tuple[int, int]):
    taps = _taps(x, *size)
    dy = dy.astype(jnp.float32)
    return jnp.stack([jnp.sum(tap.astype(jnp.float32) * dy, axis=(0, 1, 2)) for tap in taps])


def _kernel_gradient_by_row(x: Float[Array, "b y x c"], dy: Float[Array, "b y x c"], size: tuple[int, int]):
    rows, columns = size
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    ones = jnp.ones((1, x.shape[0] * width), jnp.float32)

    def add(total: jax.Array, number: Int[Array, ""]) -> tuple[jax.Array, None]:
        above = jax.lax.dynamic_slice_in_dim(padded, number, rows, axis=1)
        own = jax.lax.dynamic_index_in_dim(dy, number, axis=1, keepdims=False).astype(jnp.float32)
        sums = []
        for i in range(rows):
            for j in range(columns):
                product = (above[:, i, j : j + width].astype(jnp.float32) * own).reshape(-1, x.shape[-1])
                sums.append((ones @ product)[0])
        return total + jnp.stack(sums), None

    return jax.lax.scan(add, jnp.zeros((rows * columns, x.shape[-1]), jnp.float32), jnp.arange(height))[0]


def _backward(saved, dy: Float[Array, "b y x c"]):
    x, kernel = saved
    # XLA:CPU runs reductions one after the other. Row by row, the inputs that they share stay in the cache. A product
    # with ones sums rows faster than a reduction.
    by_row, at_once = (partial(f, size=kernel.shape[:2]) for f in (_kernel_gradient_by_row, _kernel_gradient))
    dkernel = jax.lax.platform_dependent(x, dy, cpu=by_row, default=at_once)
    return _weighted(dy, kernel[::-1, ::-1]), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_forward, _backward)


class MixFFN(nn.Module):
    """1x1 to ``2 * hidden``, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 back; no norm and no residual inside.

    Source: diffusers ``GLUMBConv``. The first SiLU acts on all ``2 * hidden`` channels. The first half of them is the
    value, the second the gate. The last projection has no bias.
    """

    features: int
    hidden: int
    dtype: Dtype
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b y x d"]) -> Float[Array, "b y x o"]:
        """Tokens on their grid."""
        y = adapted(Dense(2 * self.hidden, ("embed", "mlp"), self.dtype, name="expand"), x, self.lora)
        y = constrain_grid(silu(hidden_units(y)), "mlp")
        y = DepthwiseConv(self.dtype, name="depth")(y)
        value, gate = jnp.split(y, 2, axis=-1)
        reduce = Dense(self.features, ("mlp", "embed"), self.dtype, use_bias=False, name="reduce")
        return adapted(reduce, silu_gated(gate, value), self.lora)


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
