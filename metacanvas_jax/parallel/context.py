"""Attention on a mesh: each device runs any attention kernel on its own heads and samples.

Between the blocks, the context axis splits the tokens of a long sequence. Attention needs all keys. There are two ways:

- *over heads* (DeepSpeed Ulysses, arXiv 2309.14509): an all-to-all turns q, k and v from some tokens of all heads into
  all tokens of some heads, and another one turns the result back. The heads must divide by tensor times context;
- *over keys*: every device keeps its queries and gathers the keys and values of all tokens.

With n tokens over c devices, the first sends ``4 (n/c) (c-1)/c`` tokens of one array to each device, the second
``2 n (c-1)/c``. For two devices these are equal. All-gathers then run beside products, which all-to-alls do not, and
need no other layout of the arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.activations import constrain, current_mesh, spec_of

EXCHANGED = ("batch", "whole_seq", "exchanged_heads", None)
QUERIES = ("batch", "seq", "heads", None)
KEYS = ("batch", "whole_seq", "kv_heads", None)

Exchange = Literal["none", "heads", "any"]
"""What an attention is over: "none" for keys of another sequence; "heads" and "any" for one sequence that the context
axis may split, "heads" where ``whole_sequence`` has exchanged its streams already."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
"""``attend(q, k, v, mask) -> out`` on arrays as one device sees them; ``mask`` is a ``MaskSpec``."""


def exchanging() -> bool:
    """Whether a context axis splits the tokens."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape["context"] > 1


def whole_sequence(x: Float[Array, "b n h e"]) -> Float[Array, "b n h e"]:
    """All tokens of some heads in place of some tokens of all heads; the array itself without a context axis.

    For streams that are concatenated along the sequence before attention. With split heads that is a local operation.
    """
    return constrain(x, EXCHANGED) if exchanging() else x


def gathers_keys(heads: int) -> bool:
    """Whether an attention with so many heads, over "any" axis, gathers keys instead of exchanging tokens for heads."""
    mesh = current_mesh()
    if mesh is None or not exchanging():
        return False
    return mesh.shape["context"] == 2 or heads % (mesh.shape["context"] * mesh.shape["tensor"]) != 0


def sharded(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, *, exchange: Exchange) -> jax.Array:
    """``attend`` inside ``shard_map``: per device its samples and heads of ``q [b n h e]`` and ``k, v [b m g e]``.

    Without an exchange, every device has all keys and values and its own slice of the queries, or all queries if the
    mask is causal. Grouped key/value heads are repeated where they do not divide by the tensor axis.

    Raises:
        UserError: heads or tokens do not divide by the axes of the mesh that an exchange splits them over.
    """
    mesh = current_mesh()
    if mesh is None:
        return attend(q, k, v, mask)
    gathered = exchange == "any" and not mask.causal and gathers_keys(k.shape[2])
    if exchange != "none" and exchanging():
        _check(mesh.shape["context"], mesh.shape["tensor"], q.shape, k.shape, heads=not gathered)
    if gathered:
        query_names, key_names = QUERIES, ("batch", "seq", "kv_heads", None)
    elif exchange != "none" and exchanging():
        q, k, v = (constrain(x, EXCHANGED) for x in (q, k, v))
        query_names = key_names = EXCHANGED
    else:
        query_names, key_names = QUERIES, KEYS
        if mask.causal:  # a device would have to know the position of its queries in the sequence
            query_names = ("batch", "whole_seq", "heads", None)
    query_spec, key_spec = spec_of(query_names, q.shape), spec_of(key_names, k.shape)
    if key_spec[2] != query_spec[2]:
        if query_spec[2] is not None:
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        # Where the rules split the tokens of the queries over the tensor axis, a device has the keys of all heads.
        key_spec = PartitionSpec(*key_spec[:2], query_spec[2], None)

    # The arrays of a mask are sharded like the arrays they describe. They are arguments, as shard_map closes over none.
    owners = {"keys": key_spec, "query_segments": query_spec, "key_segments": key_spec}
    parts = {name: x for name in owners if (x := getattr(mask, name)) is not None}
    specs = {
        name: PartitionSpec(owners[name][0] if x.shape[0] == q.shape[0] else None, owners[name][1])
        for name, x in parts.items()
    }

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, parts: dict[str, jax.Array]) -> jax.Array:
        if gathered and key_spec[1] is not None:  # here, because the gradient of a gather is then a reduce-scatter
            gather = functools.partial(_gather, key_spec[1], mesh.shape["context"])
            k, v = gather(k), gather(v)
            parts = {name: x if name == "query_segments" else gather(x) for name, x in parts.items()}
        return attend(q, k, v, mask.replace(**parts))

    split = jax.shard_map(
        on_device, in_specs=(query_spec, key_spec, key_spec, specs), out_specs=query_spec, check_vma=False
    )
    return constrain(split(q, k, v, parts), QUERIES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes: str | tuple[str, ...], devices: int, x: jax.Array) -> jax.Array:
    """All tokens of ``x [b n ...]``, inside ``shard_map``."""
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)


def _gather_forward(axes: str | tuple[str, ...], devices: int, x: jax.Array) -> tuple[jax.Array, None]:
    return _gather(axes, devices, x), None


def _gather_backward(axes: str | tuple[str, ...], devices: int, _: None, dy: jax.Array) -> tuple[jax.Array]:
    if devices != 2 or axes != "context":
        return (jax.lax.psum_scatter(dy, axes, scatter_dimension=1, tiled=True),)
    # Two devices exchange halves, beside products. A reduce-scatter runs alone and pads halves that are no whole tiles.
    half, me = dy.shape[1] // 2, jax.lax.axis_index(axes)
    own, other = (jax.lax.dynamic_slice_in_dim(dy, place * half, half, axis=1) for place in (me, 1 - me))
    return (own + jax.lax.ppermute(other, axes, [(0, 1), (1, 0)]),)


_gather.defvjp(_gather_forward, _gather_backward)


def _check(context: int, tensor: int, queries: tuple[int, ...], keys: tuple[int, ...], *, heads: bool) -> None:
    for name, count in (("heads", queries[2]), ("key/value heads", keys[2])) if heads else ():
        if count % (context * tensor):
            raise UserError(
                f"mesh: tokens are exchanged for heads over context {context} x tensor {tensor} = {context * tensor} "
                f"devices, which do not divide the {count} {name} of an attention over {queries[1]} tokens"
            )
    for name, tokens in (("tokens", queries[1]), ("keys", keys[1])):
        if tokens % context:
            raise UserError(f"mesh: context {context} does not divide the {tokens} {name} of a sequence")
