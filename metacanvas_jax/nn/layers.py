"""Dense layers and norms: plain functions, and thin Linen modules that own their parameters.

Every parameter carries logical axis names (see ``parallel/rules.py``). Parameters are float32 at initialisation; the
train state decides later which of them are kept in bfloat16. ``dtype`` is the dtype of the computation and has no
default.
"""

import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from metacanvas_jax.nn.precision import exact

Dtype = Literal["float32", "bfloat16"]  # by name, so that configs stay plain data

lecun_init = nn.initializers.lecun_normal()
zeros_init = nn.initializers.zeros_init()
ones_init = nn.initializers.ones_init()


def linear(
    x: Float[Array, "*n i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*n o"]:
    """``x @ kernel + bias`` over the last axis."""
    y = contract(x, kernel)
    return y if bias is None else y + along_last(bias, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Float[Array, "*x"], kernel: Float[Array, "*w"], axes: int = 1) -> Float[Array, "*y"]:
    """The product of ``x`` and ``kernel`` over the last ``axes`` of ``x`` and the first of ``kernel``.

    The forward pass saves the kernel only if the input needs a gradient, and the input only if the kernel needs one. A
    frozen layer therefore saves no activations.
    """
    return _contract(x, kernel, axes)


def _contract(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    last = tuple(range(x.ndim - axes, x.ndim))
    return jax.lax.dot_general(x, kernel, ((last, tuple(range(axes))), ((), ())), precision=exact(x, kernel))


def _contract_forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal, axes: int):
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _contract(x.value, kernel.value, axes), saved  # a dot_general here, which the policy remat="dots" saves


def _contract_backward(axes: int, saved, dy: jax.Array | SymbolicZero):
    x, kernel = saved
    if isinstance(dy, SymbolicZero):
        return None, None
    flat, apart = (functools.partial(f, axes=axes) for f in (_flat_gradients, _gradients))
    return jax.lax.platform_dependent(x, kernel, dy, cpu=flat, default=apart)


contract.defvjp(_contract_forward, _contract_backward, symbolic_zeros=True)


def _gradients(x: jax.Array | None, kernel: jax.Array | None, dy: jax.Array, axes: int):
    dx = dkernel = None
    if kernel is not None:
        outputs = kernel.ndim - axes
        last = tuple(range(dy.ndim - outputs, dy.ndim))
        both = (last, tuple(range(axes, kernel.ndim)))
        dx = jax.lax.dot_general(dy, kernel, (both, ((), ())), precision=exact(dy, kernel))
    if x is not None:
        leading = tuple(range(x.ndim - axes))
        dkernel = jax.lax.dot_general(x, dy, ((leading, leading), ((), ())), precision=exact(x, dy))
    return dx, dkernel


def _flat_gradients(x: jax.Array | None, kernel: jax.Array | None, dy: jax.Array, axes: int):
    # For the gradient of a product with several leading axes XLA:CPU transposes its operands: a quarter of a small
    # model's step. Other platforms keep the axes apart, because merged axes cannot keep their shardings. The barrier
    # stops XLA:CPU from computing the common inputs inside each of the two products: a fifth of a small model's step.
    x, dy = jax.lax.optimization_barrier((x, dy))
    dx = dkernel = None
    if kernel is not None:
        inputs, outputs = kernel.shape[:axes], kernel.shape[axes:]
        leading = dy.shape[: dy.ndim - len(outputs)]
        dx = dy.reshape(-1, math.prod(outputs)) @ kernel.reshape(-1, math.prod(outputs)).T
        dx = dx.reshape(*leading, *inputs)
    if x is not None:
        leading, inputs = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
        rows = math.prod(leading)
        dkernel = x.reshape(rows, -1).T @ dy.reshape(rows, -1)
        dkernel = dkernel.reshape(*inputs, *dy.shape[len(leading) :])
    return dx, dkernel


def along_last(values: Float[Array, " d"], x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """``values`` in the shape of ``x``, the same at every position."""
    return _spread(x.shape, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(shape: tuple[int, ...], values: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.expand_dims(values, range(len(shape) - 1)), shape)


def _spread_forward(shape: tuple[int, ...], values: jax.Array):
    return _spread(shape, values), None


def _spread_backward(shape: tuple[int, ...], _: None, dy: jax.Array):
    return (jax.lax.platform_dependent(dy, cpu=_column_sums, default=_sums),)


_spread.defvjp(_spread_forward, _spread_backward)


def _sums(dy: jax.Array) -> jax.Array:
    return jnp.sum(dy, axis=tuple(range(dy.ndim - 1)))


def _column_sums(dy: jax.Array) -> jax.Array:
    # On XLA:CPU a product with ones sums rows ten times faster than a reduction.
    rows = dy.reshape(-1, dy.shape[-1])
    return (jnp.ones((1, rows.shape[0]), dy.dtype) @ rows)[0]


def rms_norm(x: Float[Array, "*n d"], scale: Float[Array, " d"] | None, eps: float) -> Float[Array, "*n d"]:
    """Root-mean-square norm in float32, cast back, then multiplied by the gain, in the order of transformers."""
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y if scale is None else y * along_last(scale.astype(x.dtype), y)


def layer_norm(
    x: Float[Array, "*n d"],
    scale: Float[Array, " d"] | None = None,
    bias: Float[Array, " d"] | None = None,
    eps: float = 1e-6,
) -> Float[Array, "*n d"]:
    """Layer norm with biased variance, in float32, cast back to the input's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * along_last(scale.astype(jnp.float32), y)
    if bias is not None:
        y = y + along_last(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


class Dense(nn.Module):
    """Linear layer with a kernel ``[in, out]`` whose two axes are named for sharding."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = lecun_init

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Casts input and parameters to ``dtype`` and computes in it."""
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), (x.shape[-1], self.features)
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(zeros_init, self.axes[1:]), (self.features,))
            bias = bias.astype(self.dtype)
        return linear(x.astype(self.dtype), kernel.astype(self.dtype), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    eps: float
    axis: str | None = "embed"
    scale_init: nn.initializers.Initializer = ones_init

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(self.scale_init, (self.axis,)), (x.shape[-1],))
        return rms_norm(x, scale, self.eps)


class Gain(nn.Module):
    """The gain ``[width]`` of an RMS norm that other code applies. The parameter is named as in ``RMSNorm``."""

    width: int
    axis: str | None

    @nn.compact
    def __call__(self) -> Float[Array, " d"]:
        """The parameter."""
        return self.param("scale", nn.with_logical_partitioning(ones_init, (self.axis,)), (self.width,))


class LayerNorm(nn.Module):
    """Layer norm with gain and bias."""

    eps: float
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(ones_init, (self.axis,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, (self.axis,)), (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps)
