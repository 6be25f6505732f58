"""The precision of products, and of what lies in memory between two operations."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def exact(*operands: Any) -> jax.lax.Precision | None:
    """The ``precision`` of a product of these operands: HIGHEST for float32, None for others.

    By default a TPU multiplies float32 operands after rounding them to bfloat16, and a GPU to TF32. What is computed in
    float32 beside a network in bfloat16 (noise levels, modulation) would then be no better than bfloat16. Gradients of
    a product have its precision.
    """
    return jax.lax.Precision.HIGHEST if all(x.dtype == jnp.float32 for x in operands) else None


def stored(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``x``, for a reader that computes in float32. It has no derivative: for use inside derivatives written by hand.

    Where a 16-bit array is rounded from float32 and its reader makes float32 of it again, XLA:TPU leaves both steps out
    and stores 32 bits, twice the memory and bandwidth.
    """
    return x if x.dtype == jnp.float32 else jax.lax.optimization_barrier(x)
