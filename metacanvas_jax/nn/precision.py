"""The precision of products: float32 operands are multiplied in float32."""

from typing import Any

import jax
import jax.numpy as jnp


def exact(*operands: Any) -> jax.lax.Precision | None:
    """The ``precision`` of a product of these operands: HIGHEST for float32, None for others.

    By default a TPU multiplies float32 operands after rounding them to bfloat16, and a GPU to TF32. What is computed in
    float32 beside a network in bfloat16 (noise levels, modulation) would then be no better than bfloat16. Gradients of
    a product have its precision.
    """
    return jax.lax.Precision.HIGHEST if all(x.dtype == jnp.float32 for x in operands) else None
