"""SiLU, alone and as a gate, which keep their inputs for the backward pass and nothing else.

Automatic differentiation keeps the sigmoid, its complement and both factors of a gate. In a wide feed-forward these are
up to six arrays of the hidden width, some in float32, and writing them takes longer than computing them again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.nn.precision import stored


@jax.custom_vjp
def silu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``x * sigmoid(x)``, as ``jax.nn.silu``."""
    return jax.nn.silu(x)


def _silu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.silu(x), stored(x)


def _silu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (_slope(x, dy.astype(jnp.float32)).astype(x.dtype),)


silu.defvjp(_silu_forward, _silu_backward)


@jax.custom_vjp
def silu_gated(gate: Float[Array, "*n"], value: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``silu(gate) * value``."""
    return jax.nn.silu(gate) * value


def _gated_forward(gate: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jax.nn.silu(gate) * value, (gate, value)


def _gated_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, value = saved
    wide = dy.astype(jnp.float32)
    dgate = _slope(gate, wide * value.astype(jnp.float32))
    dvalue = wide * jax.nn.silu(gate.astype(jnp.float32))
    return dgate.astype(gate.dtype), dvalue.astype(value.dtype)


silu_gated.defvjp(_gated_forward, _gated_backward)


def _slope(x: jax.Array, dy: jax.Array) -> jax.Array:
    """``dy`` times the derivative of SiLU at ``x``, in float32 and in the order of automatic differentiation."""
    x = x.astype(jnp.float32)
    share = jax.nn.sigmoid(x)
    return dy * share + (dy * x) * (share * (1.0 - share))
