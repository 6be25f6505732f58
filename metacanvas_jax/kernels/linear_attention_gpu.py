"""ReLU linear attention on GPUs, as products of XLA: two in the forward pass, four in the backward pass.

The memory of a head is the ``[e f]`` sum of ``relu(k)^T v``. The forward pass saves it with q, k and v as they came, so
that no array of float32 with all tokens is kept for the backward pass. Sums are float32. Products of two 16-bit
operands take them unchanged. A product with a float32 operand (the memory, or dout over the norm) has JAX's default
precision, which is TF32 on a GPU: 16-bit operands are exact in it, and the float32 operand keeps 11 bits, eight times
finer than bfloat16. Float32 inputs use float32 products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.linear_attention_tpu import EPS

F32 = jnp.float32


@jax.custom_vjp
def linear_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h f"]
) -> Float[Array, "b n h f"]:
    """See ``linear_attention.relu_linear_attention``."""
    return _forward(q, k, v)[0]


def _product(letters: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A product with float32 sums, for inputs of ``dtype``; a 16-bit operand beside a float32 one is widened."""
    precision = jax.lax.Precision.HIGHEST if dtype == F32 else jax.lax.Precision.DEFAULT
    if a.dtype != b.dtype:
        a, b = a.astype(F32), b.astype(F32)
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=F32)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """The output, and of every head its memory ``[b h e f]`` and the sum of its keys ``[b h e]``."""
    queries, keys = jax.nn.relu(q), jax.nn.relu(k)
    memory = _product("bmhe,bmhf->bhef", keys, v, q.dtype)
    weight = jnp.sum(keys, axis=1, dtype=F32)
    total = _product("bnhe,bhef->bnhf", queries, memory, q.dtype)
    return (total * _inverse(queries, weight)).astype(q.dtype), (q, k, v, memory, weight)


def _inverse(queries: jax.Array, weight: jax.Array) -> jax.Array:
    """One over the sum of the weights of every query, ``[b n h 1]``."""
    return 1.0 / (jnp.sum(queries.astype(F32) * weight[:, None], axis=-1, keepdims=True) + EPS)


def _backward(saved: tuple, dout: jax.Array) -> tuple:
    q, k, v, memory, weight = saved
    queries, keys = jax.nn.relu(q), jax.nn.relu(k)
    inverse = _inverse(queries, weight)
    dmemory = _product("bnhe,bnhf->bhef", queries, dout.astype(F32) * inverse, q.dtype)
    read = _product("bnhf,bhef->bnhe", dout, memory, q.dtype) * inverse
    dnorm = -jnp.sum(queries.astype(F32) * read, axis=-1, keepdims=True) * inverse
    dq = jnp.where(q > 0, read + dnorm * weight[:, None], 0.0).astype(q.dtype)
    dweight = jnp.sum(queries.astype(F32) * dnorm, axis=1)
    dkeys = _product("bmhf,bhef->bmhe", v, dmemory, q.dtype) + dweight[:, None]
    dk = jnp.where(k > 0, dkeys, 0.0).astype(k.dtype)
    return dq, dk, _product("bmhe,bhef->bmhf", keys, dmemory, q.dtype).astype(v.dtype)


linear_attention.defvjp(_forward, _backward)
