"""The linear attention of all networks: ReLU feature map, sums in float32.

``implementation`` is one of ``IMPLEMENTATIONS``. "auto" chooses a Pallas kernel on TPU ("tpu"), products with 16-bit
operands on NVIDIA GPUs ("gpu"), and the plain formula elsewhere ("xla").
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.errors import UserError
from metacanvas_jax.kernels import linear_attention_gpu, linear_attention_tpu
from metacanvas_jax.kernels.linear_attention_tpu import EPS
from metacanvas_jax.kernels.masks import MaskSpec
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.parallel.context import sharded

IMPLEMENTATIONS = ("auto", "tpu", "gpu", "xla")


@jax.named_scope("linear_attend")
def relu_linear_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h f"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b n h f"]:
    """``sum_m v_m (relu k_m . relu q_n) / (sum_m relu k_m . relu q_n + 1e-15)``, of the dtype of q.

    There is no ``e ** -0.5`` and no mask. Sums are float32. A query whose products are all zero gets zeros. The plain
    formula computes heads that the TPU kernel does not support (see its ``takes``). On a mesh each device computes its
    own samples and heads (see ``parallel/context.py``). Source: the processor of linear attention in diffusers'
    ``attention_processor.py`` (which appends ones to v instead of summing k separately).

    Raises:
        UserError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"linear attention: implementation is {implementation!r}, expected one of {IMPLEMENTATIONS}")
    forms = {"gpu": linear_attention_gpu.linear_attention}
    if linear_attention_tpu.takes(q, v):
        forms["tpu"] = linear_attention_tpu.linear_attention
    platforms = {"tpu": "tpu", "gpu": "cuda"}
    chosen = {platforms[name]: form for name, form in forms.items() if implementation in ("auto", name)}
    if not chosen:
        return plain_linear_attention(q, k, v)

    def linear_attend(q: jax.Array, k: jax.Array, v: jax.Array, _: MaskSpec) -> jax.Array:
        return jax.lax.platform_dependent(q, k, v, **chosen, default=plain_linear_attention)

    return sharded(linear_attend, q, k, v, MaskSpec(), exchange="none")


def plain_linear_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h f"]
) -> Float[Array, "b n h f"]:
    """``relu_linear_attention``, computed by XLA."""
    dtype = q.dtype
    q, k = jax.nn.relu(q).astype(jnp.float32), jax.nn.relu(k).astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=exact(q, k))
    memory = product("bmhe,bmhf->bhef", k, v.astype(jnp.float32))
    weight = jnp.sum(k, axis=1)
    total = product("bnhe,bhef->bnhf", q, memory)
    norm = product("bnhe,bhe->bnh", q, weight)
    return (total / (norm[..., None] + EPS)).astype(dtype)
