"""The softmax attention of all networks. The implementation is chosen when a program is lowered for its platform.

==========  =====================================================================================================
tpu         the Pallas kernels of ``flash_fixed_max.py``
cuda        cuDNN for 16-bit inputs with no mask, padding, a causal mask, or causal with padding; else chunks
cpu         one head after the other, in chunks of queries (``attention_cpu.py``)
other       chunks of queries of all heads; the backward pass recomputes their scores
any         short sequences, while all scores take at most 2 GiB: the plain formula, fused by XLA
==========  =====================================================================================================
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.errors import UserError
from metacanvas_jax.kernels.attention_cpu import head_by_head_attention
from metacanvas_jax.kernels.flash_common import HIDDEN
from metacanvas_jax.kernels.flash_fixed_max import flash_attention
from metacanvas_jax.kernels.masks import MaskSpec, dense_mask
from metacanvas_jax.kernels.tiles import device_kind
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.parallel.context import Exchange, sharded

CHUNK = 256  # queries
LARGEST_SCORES = 2**31  # bytes of float32 scores that the plain formula may hold
IMPLEMENTATIONS = ("auto", "flash", "cudnn", "by_head", "chunked", "xla")

log = logging.getLogger(__name__)


@jax.named_scope("attend")
def attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec | None = None,
    scale: float | None = None,
    exchange: Exchange = "none",
    implementation: str = "auto",
) -> Float[Array, "b n h e"]:
    """Softmax attention with grouped heads: head ``j`` of q uses key/value head ``j // (h / g)``.

    Scores and softmax are float32; the output has the dtype of q. ``scale`` defaults to ``e ** -0.5``. A query without
    any visible key (padding) gets a finite value without meaning. On a mesh each device computes its own samples and
    heads. ``exchange`` says whether q, k and v belong to one sequence, which the context axis may split (see
    ``parallel/context.py``). ``implementation`` is one of ``IMPLEMENTATIONS``; "auto" chooses by the table above.

    Raises:
        UserError: an unknown implementation, or "xla" where the scores would not fit (memory grows with ``n * m``).
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention: implementation is {implementation!r}, expected one of {IMPLEMENTATIONS}")
    attend = functools.partial(_attend, scale=scale, implementation=implementation)
    return sharded(attend, q, k, v, mask or MaskSpec(), exchange=exchange)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, *, scale: float | None, implementation: str
) -> jax.Array:
    if implementation != "auto":
        chosen = {"flash": flash_attention, "chunked": chunked_attention, "xla": plain_attention}
        chosen |= {"cudnn": cudnn_attention, "by_head": head_by_head_attention}
        return chosen[implementation](q, k, v, mask=mask, scale=scale)
    n, m = q.shape[1], k.shape[1]
    if n <= CHUNK and m <= 4 * CHUNK and _scores_bytes(q, k) <= LARGEST_SCORES:
        return plain_attention(q, k, v, mask=mask, scale=scale)
    on_cuda = _on_cuda(q, k, mask)
    names = {"tpu": flash_attention, "gpu": on_cuda, "cpu": head_by_head_attention}
    platform = "tpu" if device_kind().startswith("TPU") else jax.default_backend()
    _say(f"attention on {platform}: {names.get(platform, chunked_attention).__name__}")
    tpu, cuda, cpu, other = (
        functools.partial(f, mask=mask, scale=scale)
        for f in (flash_attention, on_cuda, head_by_head_attention, chunked_attention)
    )
    return jax.lax.platform_dependent(q, k, v, tpu=tpu, cuda=cuda, cpu=cpu, default=other)


@functools.cache
def _say(line: str) -> None:
    log.info(line)


def plain_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec,
    scale: float | None = None,
) -> Float[Array, "b n h e"]:
    """The plain formula with all scores in memory at once, fused by XLA.

    Raises:
        UserError: the scores take more than ``LARGEST_SCORES`` bytes.
    """
    n, m, size = q.shape[1], k.shape[1], _scores_bytes(q, k)
    if size > LARGEST_SCORES:
        raise UserError(
            f"attention: the scores of q {tuple(q.shape)} and k {tuple(k.shape)} would take {size / 2**30:.1f} GiB, "
            f'expected at most {LARGEST_SCORES / 2**30:.0f}; use implementation "auto" or "chunked"'
        )
    dense = dense_mask(mask, n, m)
    precision = "highest" if exact(q, k, v) else "default"
    # jax's own code mixes bfloat16 and float32, and takes the precision from the context.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        out = jax.nn.dot_product_attention(q, k, v, mask=dense, scale=scale, implementation="xla")
    return checkpoint_name(out, "attention_out")


def _scores_bytes(q: jax.Array, k: jax.Array) -> int:
    """Bytes of the float32 scores of all heads of all samples."""
    return 4 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]


def _on_cuda(q: jax.Array, k: jax.Array, mask: MaskSpec) -> Callable:
    """The implementation for a CUDA device. cuDNN is traced only where it runs, because tracing queries its version."""
    if not (_cudnn_runs() and q.dtype.itemsize == 2 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0):
        return chunked_attention
    if mask.query_segments is not None or mask.causal != _plain_causal(q, k, mask):
        return chunked_attention
    return causal_padded_attention if mask.causal and mask.keys is not None else cudnn_attention


@functools.cache
def _cudnn_runs() -> bool:
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


def _plain_causal(q: jax.Array, k: jax.Array, mask: MaskSpec) -> bool:
    return mask.causal and mask.offset == 0 and q.shape[1] == k.shape[1]


def cudnn_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec,
    scale: float | None = None,
    library: str = "cudnn",
) -> Float[Array, "b n h e"]:
    """cuDNN's fused attention, forward and backward.

    Padding is passed as a number of keys, after ``keys_first``. Three masks are passed as a dense array: padding with
    causal, segments, and causal with an offset. ``library`` is the ``implementation`` argument for ``jax.nn``.

    Raises:
        UserError: a dense mask would take more than ``LARGEST_SCORES`` bytes.
    """
    causal, dense, lengths = _plain_causal(q, k, mask), None, None
    if mask.query_segments is not None or mask.causal != causal or (causal and mask.keys is not None):
        size = 2 * q.shape[0] * q.shape[1] * k.shape[1]
        if size > LARGEST_SCORES:
            raise UserError(
                f"attention: cuDNN would need a mask of {size / 2**30:.1f} GiB for q {tuple(q.shape)} and "
                f'k {tuple(k.shape)}; use implementation "chunked", or no segments and no causal mask over padding'
            )
        dense, causal = dense_mask(mask, q.shape[1], k.shape[1]), False
    elif mask.keys is not None:
        k, v, lengths = keys_first(k, v, mask.keys)
    return _library_attention(library, q, k, v, mask=dense, is_causal=causal, lengths=lengths, scale=scale)


def causal_padded_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n g e"],
    v: Float[Array, "b n g e"],
    *,
    mask: MaskSpec,
    scale: float | None = None,
    library: str = "cudnn",
) -> Float[Array, "b n h e"]:
    """Causal attention with padding. At run time cuDNN is used if all padding is on the right, else chunks."""
    keys = jnp.broadcast_to(mask.keys, k.shape[:2])
    lengths = jnp.sum(keys, axis=1, dtype=jnp.int32)
    on_the_right = jnp.all(keys == (jnp.arange(k.shape[1], dtype=jnp.int32)[None] < lengths[:, None]))

    def by_length(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _library_attention(library, q, k, v, is_causal=True, lengths=at_least_one(lengths), scale=scale)

    def by_chunks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return chunked_attention(q, k, v, mask=mask, scale=scale)

    return checkpoint_name(jax.lax.cond(on_the_right, by_length, by_chunks, q, k, v), "attention_out")


def keys_first(
    k: Float[Array, "b m g e"], v: Float[Array, "b m g e"], keys: Bool[Array, "#b m"]
) -> tuple[Float[Array, "b m g e"], Float[Array, "b m g e"], Int[Array, " b"]]:
    """Keys and values sorted so that padding comes last, and the number of the others (at least one).

    Without a causal mask the order of keys does not matter, so the number can replace the mask ``keys``.
    """
    keys = jnp.broadcast_to(keys, k.shape[:2])
    order = jnp.argsort(~keys, axis=1, stable=True)
    sample = jnp.arange(k.shape[0])[:, None]
    k, v = (x.at[sample, order].get(mode="promise_in_bounds", unique_indices=True) for x in (k, v))
    return k, v, at_least_one(jnp.sum(keys, axis=1, dtype=jnp.int32))


def at_least_one(lengths: Int[Array, " b"]) -> Int[Array, " b"]:
    """A sample without keys is given one: a softmax over no keys would not be finite."""
    return jnp.maximum(lengths, 1)


def _library_attention(
    library: str, q: jax.Array, k: jax.Array, v: jax.Array, *, lengths: jax.Array | None, **options: Any
) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # jax's own code mixes bfloat16 and float32
        out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=library, **options)
    return checkpoint_name(out, "attention_out")


def chunked_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "b n h e"]:
    """Softmax attention over ``chunk`` queries at a time; the backward pass recomputes the scores.

    Memory does not grow with ``n * m``, neither forward nor backward.
    """
    n, e = q.shape[1], q.shape[3]
    m, g = k.shape[1:3]
    count = -(-n // chunk)
    scale = e**-0.5 if scale is None else scale

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - n), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    queries = rearrange(cut(q), "c b n (g r) e -> c b g r n e", g=g)
    keys, values = rearrange(k, "b m g e -> b g m e"), rearrange(v, "b m g e -> b g m e")
    segments = None if mask.query_segments is None else cut(mask.query_segments)

    product = functools.partial(jnp.einsum, precision=exact(q, k, v), preferred_element_type=jnp.float32)

    @jax.checkpoint
    def one(chunk_inputs: tuple) -> jax.Array:
        queries, start, segments = chunk_inputs
        scores = product("bgrne,bgme->bgrnm", queries, keys) * scale
        own = mask.replace(query_segments=segments)
        visible = dense_mask(own, chunk, m, start)
        if visible is not None:
            scores = jnp.where(visible[:, :, None], scores, HIDDEN)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(values.dtype)
        return product("bgrnm,bgme->bgrne", weights, values) / total

    out = jax.lax.map(one, (queries, chunk * jnp.arange(count), segments))
    out = rearrange(out, "c b g r n e -> b (c n) (g r) e")[:, :n].astype(q.dtype)
    return checkpoint_name(out, "attention_out")
