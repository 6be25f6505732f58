"""Attention of a few tokens that follow many: the step of generating text with a cache of keys and values."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.flash_common import HIDDEN


@jax.named_scope("attend_after")
def attention_after(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n g e"],
    v: Float[Array, "b n g e"],
    past_k: Float[Array, "b l g e"],
    past_v: Float[Array, "b l g e"],
    seen: Bool[Array, "b l"],
) -> Float[Array, "b n h e"]:
    """Softmax attention with grouped heads to the tokens before, those that are ``seen``, and causally to its own.

    The scores of the two parts are put together, not their keys and values: a copy of the cache would take longer than
    the attention itself. Scores and softmax are float32. Memory grows with ``n * l``, so that ``n`` should be small.
    """
    n, m = q.shape[1], past_k.shape[1]
    queries = rearrange(q, "b n (g r) e -> b g r n e", g=k.shape[2]) * q.shape[-1] ** -0.5
    past_k, past_v = past_k.astype(q.dtype), past_v.astype(q.dtype)

    def scores(keys: jax.Array) -> jax.Array:
        return jnp.einsum("bgrne,bmge->bgrnm", queries, keys, preferred_element_type=jnp.float32)

    causal = jnp.tril(jnp.ones((n, n), bool))[None, None, None]
    before = jnp.where(seen[:, None, None, None], scores(past_k), HIDDEN)
    own = jnp.where(causal, scores(k), HIDDEN)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("bgrnm,bmge->bngre", weights[..., :m], past_v, preferred_element_type=jnp.float32)
    out += jnp.einsum("bgrnm,bmge->bngre", weights[..., m:], v, preferred_element_type=jnp.float32)
    return rearrange(out, "b n g r e -> b n (g r) e").astype(q.dtype)
