"""Dense layers, convolutions and norms: plain functions, and thin Linen modules that own their parameters.

Every parameter carries logical axis names (see ``parallel/rules.py``); ``param_dtype`` is float32 at initialisation and
the train state decides later what is kept in bfloat16. ``dtype`` is the dtype computed in, and it is never implicit.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

Dtype = str  # a dtype by name, so that configs stay plain data

lecun_init = nn.initializers.lecun_normal()
zeros_init = nn.initializers.zeros_init()
ones_init = nn.initializers.ones_init()


def linear(
    x: Float[Array, "*n i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*n o"]:
    """``x @ kernel + bias`` over the last axis.

    Its derivative keeps the kernel only where the input has a gradient, and the input only where the kernel has one:
    a frozen layer that a gradient passes leaves nothing of its own behind.
    """
    y = _product(x, kernel)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, kernel)


def _product_forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal):
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return jnp.einsum("...i,io->...o", x.value, kernel.value), saved  # in sight of what ``remat="dots"`` looks for


def _product_backward(saved, dy: jax.Array | SymbolicZero):
    x, kernel = saved
    if isinstance(dy, SymbolicZero):
        return None, None
    return jax.lax.platform_dependent(x, kernel, dy, cpu=_flat_gradients, default=_gradients)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _gradients(x: jax.Array | None, kernel: jax.Array | None, dy: jax.Array):
    dx = None if kernel is None else jnp.einsum("...o,io->...i", dy, kernel)
    leading = tuple(range(dy.ndim - 1))
    return dx, None if x is None else jax.lax.dot_general(x, dy, ((leading, leading), ((), ())))


def _flat_gradients(x: jax.Array | None, kernel: jax.Array | None, dy: jax.Array):
    # XLA:CPU transposes its operands for the gradient of a product with several leading axes, a quarter of a small
    # model's step. Elsewhere the axes stay apart, because merging them would cut across their shardings. Without the
    # barrier it computes what the two products read inside each of them, a fifth of a small step.
    x, dy = jax.lax.optimization_barrier((x, dy))
    flat = dy.reshape(-1, dy.shape[-1])
    dx = None if kernel is None else (flat @ kernel.T).reshape(*dy.shape[:-1], kernel.shape[0])
    return dx, None if x is None else x.reshape(-1, x.shape[-1]).T @ flat


def rms_norm(x: Float[Array, "*n d"], scale: Float[Array, " d"] | None, eps: float) -> Float[Array, "*n d"]:
    """Root-mean-square norm in float32; the gain is multiplied after the cast back, as transformers does."""
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y if scale is None else y * jnp.expand_dims(scale.astype(x.dtype), range(y.ndim - 1))


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
        y = y * jnp.expand_dims(scale.astype(jnp.float32), range(y.ndim - 1))
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(jnp.float32), range(y.ndim - 1))
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
        """Computes in ``dtype`` whatever the dtypes of input and parameters."""
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
    """The gain ``[width]`` of an RMS norm that is applied elsewhere; its parameter is that of ``RMSNorm``."""

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


class Conv(nn.Module):
    """Convolution over the middle axes of ``[b ... c]``; kernel ``[*size, in / groups, out]``, no dilation."""

    features: int
    size: tuple[int, ...]
    dtype: Dtype
    strides: tuple[int, ...] | None = None
    padding: tuple[tuple[int, int], ...] | str = "SAME"
    groups: int = 1
    use_bias: bool = True
    axes: tuple[str | None, str | None] = (None, None)

    @nn.compact
    def __call__(self, x: Float[Array, "b *n i"]) -> Float[Array, "b *m o"]:
        """Computes in ``dtype``; zero padding."""
        spatial = "DHW"[-len(self.size) :]
        shape = (*self.size, x.shape[-1] // self.groups, self.features)
        names = (*(None for _ in self.size), *self.axes)
        kernel = self.param("kernel", nn.with_logical_partitioning(lecun_init, names), shape)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides or (1,) * len(self.size),
            self.padding,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.groups,
        )
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, self.axes[1:]), (self.features,))
        return y + jnp.expand_dims(bias.astype(self.dtype), range(y.ndim - 1))
