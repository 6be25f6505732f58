"""Row-wise dot products of two arrays per head: squared lengths, and the ``delta`` of the gradient of softmax.

XLA would sum over channels through float32 copies of both arrays in another layout. This kernel reads each array once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from metacanvas_jax.kernels.flash_common import product
from metacanvas_jax.kernels.tiles import LANES

ROWS = 1024
SUBLANES = 8


def row_products(
    x: Float[Array, "b n d"], y: Float[Array, "b n d"], heads: int, interpret: bool | pltpu.InterpretParams = False
) -> Float[Array, "b h 1 n"]:
    """``sum_e x y`` of every head in float32; ``d`` is ``heads`` times a multiple of 128."""
    samples, n, channels = x.shape
    width = channels // heads
    block = min(ROWS, -(-n // LANES) * LANES)

    def kernel(x, y, out) -> None:
        terms = x[...].astype(jnp.float32) * y[...].astype(jnp.float32)
        out[...] = product(jnp.ones((SUBLANES, width), jnp.float32), terms, (1, 1))[:1]

    rows = pl.BlockSpec((None, block, width), lambda b, h, i: (b, i, h))
    return pl.pallas_call(
        kernel,
        grid=(samples, heads, -(-n // block)),
        in_specs=[rows, rows],
        out_specs=pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h, 0, i)),
        out_shape=jax.ShapeDtypeStruct((samples, heads, 1, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=x.nbytes + y.nbytes, transcendentals=0),
        interpret=interpret,
        name="row_products",
    )(x, y)
