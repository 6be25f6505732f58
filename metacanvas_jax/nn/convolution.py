"""Convolutions of images and videos: plain functions, and thin Linen modules that own their kernels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from metacanvas_jax.nn.layers import Dtype, lecun_init, zeros_init
from metacanvas_jax.nn.precision import exact

Padding = tuple[tuple[int, int], ...]


def convolve(
    x: Float[Array, "b *n i"], kernel: Float[Array, "*r i o"], strides: tuple[int, ...], padding: Padding
) -> Float[Array, "b *m o"]:
    """Convolution over the two or three middle axes, zero padded, as in torch (no flip)."""
    at_once = functools.partial(_convolve, strides=strides, padding=padding)
    if len(strides) == 2 or padding[0] != (0, 0):
        return at_once(x, kernel)
    # XLA:CPU has a fast convolution for two axes only.
    by_tap = functools.partial(_convolve_by_tap, strides=strides, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=by_tap, default=at_once)


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding) -> jax.Array:
    spatial = "DHW"[-len(strides) :]
    names = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    precision = exact(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=names, precision=precision)


def _convolve_by_tap(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding) -> jax.Array:
    """A convolution over time as a sum of two-dimensional convolutions, one for each frame of the kernel."""
    step, count = strides[0], (x.shape[1] - kernel.shape[0]) // strides[0] + 1
    if count < 1:
        return _convolve(x, kernel, strides, padding)

    def tap(number: int | Int[Array, ""], kernel: jax.Array) -> jax.Array:
        frames = jax.lax.dynamic_slice_in_dim(x, number, step * (count - 1) + 1, axis=1)[:, ::step]
        return _convolve(rearrange(frames, "b t h w i -> (b t) h w i"), kernel, strides[1:], padding[1:])

    # A loop, so that only one term of the sum is in memory at a time.
    made = jax.eval_shape(tap, 0, kernel[0])
    taps = (jnp.arange(kernel.shape[0]), kernel)
    total, _ = jax.lax.scan(lambda total, one: (total + tap(*one), None), jnp.zeros(made.shape, made.dtype), taps)
    return rearrange(total, "(b t) h w o -> b t h w o", t=count)


def convolve_doubled(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b H W o"]:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution, without making the upsampled image.

    An output pixel depends on 2x2 pixels of ``x``. Kernel entries that meet the same pixel are therefore added first.
    This gives four 2x2 kernels, one for each parity of the output's row and column, and 4/9 of the products. Kernel
    entries are added in float32. The products have the dtype of ``x``.
    """
    # Output row 2i reads input row i - 1 once and row i twice. Output row 2i + 1 reads row i twice and row i + 1 once.
    above, own, below = kernel.astype(jnp.float32)
    rows = jnp.stack([above, own + below]), jnp.stack([above + own, below])
    out = []
    for i, half in enumerate(rows):
        first, middle, last = half[:, 0], half[:, 1], half[:, 2]
        columns = jnp.stack([first, middle + last], axis=1), jnp.stack([first + middle, last], axis=1)
        for j, part in enumerate(columns):
            out.append(_convolve(x, part.astype(x.dtype), (1, 1), ((1 - i, i), (1 - j, j))))
    return rearrange(jnp.stack(out), "(i j) b h w o -> b (h i) (w j) o", i=2)


class Conv(nn.Module):
    """Convolution over the middle axes of ``[b ... c]``; kernel ``[*size, in, out]``.

    By default ``strides`` are 1 and ``padding`` keeps the size. With ``doubled`` the image is first upsampled by 2, by
    repeating its pixels.
    """

    features: int
    size: tuple[int, ...]
    dtype: Dtype
    strides: tuple[int, ...] | None = None
    padding: Padding | None = None
    use_bias: bool = True
    axes: tuple[str | None, str | None] = (None, None)
    doubled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b *n i"]) -> Float[Array, "b *m o"]:
        """Computes in ``dtype``; zero padding."""
        shape = (*self.size, x.shape[-1], self.features)
        names = (*(None for _ in self.size), *self.axes)
        kernel = self.param("kernel", nn.with_logical_partitioning(lecun_init, names), shape)
        if self.doubled:
            y = convolve_doubled(x.astype(self.dtype), kernel)
        else:
            strides = self.strides or (1,) * len(self.size)
            padding = self.padding or tuple((size // 2, size // 2) for size in self.size)
            y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), strides, padding)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, self.axes[1:]), (self.features,))
        return y + jnp.expand_dims(bias.astype(self.dtype), range(y.ndim - 1))
