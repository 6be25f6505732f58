"""Attention masks as a structure (causal, padding, segments), so that long sequences need no dense mask."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class MaskSpec:
    """Which keys a query sees. The caller never makes a ``[n m]`` array.

    With ``causal``, query ``i`` sees the keys ``j <= i + offset``; ``offset`` is the number of keys of a prefix, which
    come before those of the queries. ``keys`` is False on padding. With segments a query sees only keys of its segment.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    offset: int = struct.field(pytree_node=False, default=0)
    keys: Bool[Array, "b m"] | None = None
    query_segments: Int[Array, "b n"] | None = None
    key_segments: Int[Array, "b m"] | None = None


def dense_mask(mask: MaskSpec, n: int, m: int, start: int | Int[Array, ""] = 0) -> Bool[Array, "b 1 n m"] | None:
    """The mask as ``[b 1 n m]`` (b is 1 if all samples share it), or None if every query sees every key.

    The ``n`` queries begin with number ``start``.
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
