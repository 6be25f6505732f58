"""The one linear attention of the project: ReLU feature map, sums in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.linear_attention_tpu import EPS, linear_attention, takes
from metacanvas_jax.kernels.masks import MaskSpec
from metacanvas_jax.parallel.context import sharded


@jax.named_scope("linear_attend")
def relu_linear_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h f"]
) -> Float[Array, "b n h f"]:
    """``sum_m v_m (relu k_m . relu q_n) / (sum_m relu k_m . relu q_n + 1e-15)``, of the dtype of q.

    There is no ``e ** -0.5`` and no mask. Sums are float32; a query that meets only zeros gets zeros. On TPU a Pallas
    kernel computes it, on a mesh per device (see ``parallel/context.py``). Source: diffusers
    ``SanaLinearAttnProcessor2_0`` (which appends ones to v instead of summing k apart).
    """
    if not takes(q, v):
        return plain_linear_attention(q, k, v)

    def linear_attend(q: jax.Array, k: jax.Array, v: jax.Array, _: MaskSpec) -> jax.Array:
        return jax.lax.platform_dependent(q, k, v, tpu=linear_attention, default=plain_linear_attention)

    return sharded(linear_attend, q, k, v, MaskSpec(), exchange=False)


def plain_linear_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h f"]
) -> Float[Array, "b n h f"]:
    """The same by XLA."""
    dtype = q.dtype
    q, k = jax.nn.relu(q).astype(jnp.float32), jax.nn.relu(k).astype(jnp.float32)
    memory = jnp.einsum("bmhe,bmhf->bhef", k, v.astype(jnp.float32))
    weight = jnp.sum(k, axis=1)
    total = jnp.einsum("bnhe,bhef->bnhf", q, memory)
    norm = jnp.einsum("bnhe,bhe->bnh", q, weight)
    return (total / (norm[..., None] + EPS)).astype(dtype)
