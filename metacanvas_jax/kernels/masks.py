"""Who may look at whom, said by structure and never as a dense array over a long sequence."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


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
