"""Softmax attention on a CPU, forward and backward: one head after the other, its queries in chunks.

The scores of one chunk, and the keys and values of a head, stay in the CPU's cache. The backward pass recomputes the
scores from the saved log-sum-exp, as in Dao, "FlashAttention-2" (arXiv 2307.08691). It does not differentiate the steps
of the softmax one by one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.flash_common import HIDDEN, TINY
from metacanvas_jax.kernels.masks import MaskSpec, dense_mask

LOWEST = HIDDEN / 10  # lower limit of a row's maximum: a query that sees no key gets weights exp(HIDDEN - LOWEST) = 0
ROWS = 768  # the most queries of one chunk, summed over the heads of a group


class Problem(NamedTuple):
    """The static values of a call: queries per chunk, scale, and the static fields of ``MaskSpec``."""

    chunk: int
    scale: float
    causal: bool
    offset: int


def head_by_head_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec,
    scale: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "b n h e"]:
    """Softmax attention with grouped heads; differentiable in q, k and v; zeros for a query that sees no key.

    Scores, softmax and sums are float32. ``chunk`` is a number of queries. Memory does not grow with ``n * m``.
    """
    if chunk is None:
        count = -(-q.shape[1] * q.shape[2] // (ROWS * k.shape[2]))
        chunk = 8 * -(-q.shape[1] // (8 * count))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    problem = Problem(chunk, scale, mask.causal, mask.offset)
    return _attend(problem, q, k, v, _samples(mask, q.shape[0], chunk))


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """``[b n ...]`` as ``[b c chunk ...]``, with zeros after the last query."""
    count = -(-x.shape[1] // chunk)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - x.shape[1]), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(x.shape[0], count, chunk, *x.shape[2:])


def _rows(x: Float[Array, "b n h e"], chunk: int, groups: int) -> Float[Array, "b g c rows e"]:
    return rearrange(_cut(x, chunk), "b c n (g r) e -> b g c (r n) e", g=groups)


def _heads(x: Float[Array, "b g c rows e"], chunk: int, n: int) -> Float[Array, "b n h e"]:
    return rearrange(x, "b g c (r n) e -> b (c n) (g r) e", n=chunk)[:, :n]


def _samples(mask: MaskSpec, batch: int, chunk: int) -> tuple[jax.Array | None, ...]:
    """Keys, query segments and key segments of the mask, as a row ``[1 m]`` (``[c chunk]`` for queries) per sample."""

    def all_of(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.broadcast_to(x, (batch, x.shape[1]))[:, None]

    segments = mask.query_segments
    segments = None if segments is None else _cut(jnp.broadcast_to(segments, (batch, segments.shape[1])), chunk)
    return all_of(mask.keys), segments, all_of(mask.key_segments)


def _visible(
    problem: Problem, own: tuple[jax.Array | None, ...], number: jax.Array, m: int
) -> Bool[Array, "chunk m"] | None:
    """The keys that the queries of chunk ``number`` of one sample see; None if they see all."""
    keys, segments, key_segments = own
    if segments is not None:
        segments = jax.lax.dynamic_index_in_dim(segments, number)
    mask = MaskSpec(problem.causal, problem.offset, keys, segments, key_segments)
    visible = dense_mask(mask, problem.chunk, m, number * problem.chunk)
    return None if visible is None else visible[0, 0]


product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, masks: tuple) -> jax.Array:
    return _forward(problem, q, k, v, masks)[0]


def _forward(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, masks: tuple):
    (chunk, scale, *_), n, (m, g) = problem, q.shape[1], k.shape[1:3]
    queries = _rows(q, chunk, g)
    keys, values = (rearrange(x, "b m g e -> b g m e") for x in (k, v))
    numbers = jnp.arange(queries.shape[2])

    def of_sample(sample: tuple):
        queries, keys, values, own = sample

        def of_group(group: tuple):
            queries, keys, values = group

            def of_chunk(part: tuple):
                number, q = part
                scores = product(q, keys.T)
                visible = _visible(problem, own, number, m)
                if visible is not None:
                    scores = jnp.where(visible[None], scores.reshape(-1, chunk, m), HIDDEN).reshape(scores.shape)
                top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
                weights = jnp.exp(scale * (scores - top))
                total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), TINY)
                return product(weights.astype(values.dtype), values) / total, scale * top + jnp.log(total)

            return jax.lax.map(of_chunk, (numbers, queries))

        return jax.lax.map(of_group, (queries, keys, values))

    out, lse = jax.lax.map(of_sample, (queries, keys, values, masks))
    out = checkpoint_name(_heads(out, chunk, n).astype(q.dtype), "attention_out")
    return out, (q, k, v, masks, out, checkpoint_name(lse, "attention_lse"))


def _backward(problem: Problem, saved: tuple, d_out: Float[Array, "b n h e"]):
    q, k, v, masks, out, lse = saved
    (chunk, scale, *_), n, (m, g) = problem, q.shape[1], k.shape[1:3]
    queries, d_rows = (_rows(x, chunk, g) for x in (q, d_out))
    shares = _rows(jnp.sum((d_out * out).astype(jnp.float32), axis=-1, keepdims=True), chunk, g)
    keys, values = (rearrange(x, "b m g e -> b g m e") for x in (k, v))
    numbers = jnp.arange(queries.shape[2])

    def of_sample(sample: tuple):
        *parts, own = sample

        def of_group(group: tuple):
            queries, d_rows, lse, shares, keys, values = group

            def of_chunk(sums: tuple, part: tuple):
                number, q, d, lse, share = part
                # With keys as the first axis, two of the three gradients are products without a transposed operand.
                scores = product(keys, q.T)
                visible = _visible(problem, own, number, m)
                if visible is not None:
                    seen = visible.T[:, None]
                    scores = jnp.where(seen, scores.reshape(m, -1, chunk), HIDDEN).reshape(scores.shape)
                weights = jnp.exp(scale * scores - lse.T)
                d_scores = weights * (product(values, d.T) - share.T)
                weights, d_scores = weights.astype(values.dtype), d_scores.astype(values.dtype)
                return (sums[0] + product(d_scores, q), sums[1] + product(weights, d)), product(d_scores.T, keys)

            zeros = jnp.zeros(keys.shape, jnp.float32)
            return jax.lax.scan(of_chunk, (zeros, zeros), (numbers, queries, d_rows, lse, shares))

        return jax.lax.map(of_group, tuple(parts))

    (d_keys, d_values), d_queries = jax.lax.map(of_sample, (queries, d_rows, lse, shares, keys, values, masks))
    d_keys, d_values = (rearrange(x, "b g m e -> b m g e") for x in (d_keys, d_values))
    d_queries = scale * _heads(d_queries, chunk, n)
    return d_queries.astype(q.dtype), (scale * d_keys).astype(k.dtype), d_values.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
