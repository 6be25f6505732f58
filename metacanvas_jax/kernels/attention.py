"""The one softmax attention of the project."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.parallel.context import sharded

CHUNK = 256  # queries
HIDDEN = -1e30  # score of a key that is not seen


@struct.dataclass
class MaskSpec:
    """Who may look at whom, said by structure and never as a ``[n m]`` array of the caller's.

    ``causal``: query ``i`` sees keys ``j <= i + offset``; ``offset`` is the number of keys of a prefix that stand
    before the queries' own. ``keys`` is False on padding. With segments a query sees the keys of its own segment only.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    offset: int = struct.field(pytree_node=False, default=0)
    keys: Bool[Array, "b m"] | None = None
    query_segments: Int[Array, "b n"] | None = None
    key_segments: Int[Array, "b m"] | None = None


@jax.named_scope("attend")
def attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec | None = None,
    scale: float | None = None,
    exchange: bool = False,
) -> Float[Array, "b n h e"]:
    """Softmax attention with grouped heads: head ``j`` of q uses key/value head ``j // (h / g)``.

    Scores and softmax are float32, the output has the dtype of q. ``scale`` defaults to ``e ** -0.5``. A query that
    sees no key at all (padding) gets a finite value without meaning. On a mesh each device runs this on its own samples
    and heads; ``exchange`` says that q, k and v are of one sequence that the context axis may split (see
    ``parallel/context.py``).
    """
    attend = functools.partial(_attention, scale=scale)
    return sharded(attend, q, k, v, mask or MaskSpec(), exchange=exchange)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, *, scale: float | None) -> jax.Array:

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # jax's own code mixes bfloat16 and float32
            dense = dense_mask(mask, q.shape[1], k.shape[1])
            return jax.nn.dot_product_attention(q, k, v, mask=dense, scale=scale, implementation="xla")

    if q.shape[1] <= CHUNK:
        return whole(q, k, v)
    return jax.lax.platform_dependent(
        q, k, v, cpu=lambda q, k, v: chunked_attention(q, k, v, mask, scale), default=whole
    )


def chunked_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    mask: MaskSpec,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "b n h e"]:
    """The same function, ``chunk`` queries at a time and their scores computed again in the backward pass.

    For CPUs: the scores of a chunk stay in cache, and memory does not grow with ``n * m``.
    """
    b, n, _, e = q.shape
    m, g = k.shape[1:3]
    count = -(-n // chunk)
    scale = e**-0.5 if scale is None else scale

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - n), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(b, count, chunk, *x.shape[2:]), 1, 0)

    queries = rearrange(cut(q), "c b n (g r) e -> c b g r n e", g=g)
    keys, values = rearrange(k, "b m g e -> b g m e"), rearrange(v, "b m g e -> b g m e")
    segments = None if mask.query_segments is None else cut(mask.query_segments)

    @jax.checkpoint
    def one(chunk_inputs: tuple) -> jax.Array:
        queries, start, segments = chunk_inputs
        scores = jnp.einsum("bgrne,bgme->bgrnm", queries, keys, preferred_element_type=jnp.float32) * scale
        own = mask.replace(query_segments=segments)
        visible = dense_mask(own, chunk, m, start)
        if visible is not None:
            scores = jnp.where(visible[:, :, None], scores, HIDDEN)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(values.dtype)
        return jnp.einsum("bgrnm,bgme->bgrne", weights, values, preferred_element_type=jnp.float32) / total

    out = jax.lax.map(one, (queries, chunk * jnp.arange(count), segments))
    return rearrange(out, "c b g r n e -> b (c n) (g r) e")[:, :n].astype(q.dtype)


def dense_mask(mask: MaskSpec, n: int, m: int, start: int | Int[Array, ""] = 0) -> Bool[Array, "b 1 n m"] | None:
    """The mask as ``[b 1 n m]`` (b is 1 if it is the same for all samples), or None if everyone sees everyone.

    The ``n`` queries are those from number ``start`` on.
    """
    parts = []
    if mask.causal:
        parts.append((jnp.arange(m)[None, :] <= jnp.arange(n)[:, None] + start + mask.offset)[None])
    if mask.keys is not None:
        parts.append(jnp.broadcast_to(mask.keys[:, None, :], (mask.keys.shape[0], n, m)))
    if mask.query_segments is not None:
        parts.append(mask.query_segments[:, :, None] == mask.key_segments[:, None, :])
    if not parts:
        return None
    shape = jnp.broadcast_shapes(*(part.shape for part in parts))
    full = jnp.broadcast_to(parts[0], shape)
    for part in parts[1:]:
        full = full & jnp.broadcast_to(part, shape)
    return full[:, None]
