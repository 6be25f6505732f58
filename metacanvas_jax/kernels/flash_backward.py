"""The backward kernel of flash attention: gradients of q, k and v in one pass over all pairs.

The inner loop goes over blocks of queries, so the gradients of a block of keys and values are summed on the chip. The
gradient of ``chunk`` queries is a float32 sum on the chip as well. It stays there for all blocks of keys, so that no
partial sums are written to HBM. If a chunk is shorter than the sequence, the pass is repeated for each chunk, and the
gradients of keys and values are summed over the chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from metacanvas_jax.kernels.flash_common import (
    Problem,
    column,
    dispatch,
    first_seeing,
    in_flight,
    product,
    rows,
    specs,
    visible,
)
from metacanvas_jax.kernels.row_products import row_products


def backward_pass(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: list,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of ``q [b n (h e)]`` and of ``k, v [b m (g e)]``; ``lse`` is ``[b h 1 n]``."""
    tiles, samples, heads = problem.backward, q.shape[0], problem.heads
    blocks_q, blocks_k = problem.blocks(tiles)
    per_chunk = min(problem.chunk // tiles.block_q, blocks_q)
    chunks = -(-blocks_q // per_chunk)

    delta = row_products(dout, out, heads, problem.interpret)

    def place(b, h, c, j, i):
        first = jnp.maximum(c * per_chunk + i, first_seeing(problem, tiles, j))
        return b, h, jnp.minimum(first, blocks_q - 1), j

    def gradient_of_queries(b, h, c, j, i):  # stays at the first block until the last keys pass
        i = jnp.where(j == blocks_k - 1, c * per_chunk + i, c * per_chunk)
        return b, jnp.minimum(i, blocks_q - 1), h

    own, other, value, given = specs(problem, tiles, place)
    sums = chunks > 1 or heads != problem.groups
    dkv = jax.ShapeDtypeStruct((chunks, samples, problem.m, heads * problem.width), jnp.float32 if sums else k.dtype)
    dkv_spec = pl.BlockSpec((None, None, tiles.block_k, problem.width), lambda b, h, c, j, i: (c, b, j, h))
    pairs = samples * heads * problem.n * problem.m
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, problem, per_chunk),
        grid=(samples, heads, chunks, blocks_k, per_chunk),
        in_specs=[own, other, other, own, value, value, *given],
        out_specs=[pl.BlockSpec((None, tiles.block_q, problem.width), gradient_of_queries), dkv_spec, dkv_spec],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), dkv, dkv],
        scratch_shapes=[
            f32((per_chunk, problem.width, tiles.block_q)),
            f32((problem.width, tiles.block_k)),
            f32((problem.width, tiles.block_k)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=problem.vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * problem.width,
            bytes_accessed=2 * q.nbytes * (blocks_k + 1) + 4 * k.nbytes * chunks,
            transcendentals=pairs,
        ),
        interpret=problem.interpret,
        name="flash_attention_backward",
    )(q, k, v, dout, lse, delta, *ids)

    def per_group(x: jax.Array) -> jax.Array:
        if not sums:
            return x[0]
        x = x.reshape(chunks, *k.shape[:2], problem.groups, heads // problem.groups, problem.width)
        return jnp.sum(x, axis=(0, 4)).reshape(k.shape).astype(k.dtype)

    return dq, per_group(dk), per_group(dv)


def _backward_kernel(problem: Problem, per_chunk: int, q, k, v, dout, lse, delta, *refs) -> None:
    tiles, refs = problem.backward, list(refs)
    query_ids = refs.pop(0) if problem.query_ids else None
    key_ids = refs.pop(0) if problem.key_ids else None
    dq, dk, dv, dq_sum, dk_sum, dv_sum = refs
    j, step = pl.program_id(3), pl.program_id(4)
    i = pl.program_id(2) * per_chunk + step
    blocks_q, blocks_k = problem.blocks(tiles)
    tail_q, tail_k = problem.n % tiles.block_q, problem.m % tiles.block_k

    @pl.when(step == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _():
        dq_sum[step] = jnp.zeros(dq_sum.shape[1:], dq_sum.dtype)

    def differentiate(masked: bool) -> None:
        ids = column(key_ids[...]) if masked and key_ids is not None else None
        valid_q = problem.n - i * tiles.block_q if masked and tail_q else None
        valid_k = problem.m - j * tiles.block_k if masked and tail_k else None

        def weigh(a: int, c: int):
            at = slice(a, a + tiles.tile_q)
            keys, values = (rows(x, c, tiles.tile_k, valid_k) for x in (k, v))
            queries, douts = (rows(x, a, tiles.tile_q, valid_q) for x in (q, dout))
            logits = product(keys, queries, (1, 1))
            if problem.factor != 1.0:
                logits = logits * problem.factor
            weights = jnp.exp2(logits - lse[:, at])
            dlogits = weights * (product(values, douts, (1, 1)) - delta[:, at])
            if masked:
                own = None if query_ids is None else query_ids[...]
                seen = visible(problem, tiles, i, j, a, c, own, ids)
                weights, dlogits = jnp.where(seen, weights, 0.0), jnp.where(seen, dlogits, 0.0)
            return queries, douts, keys, weights.astype(v.dtype), dlogits.astype(q.dtype)

        def spread(a: int, c: int, tile) -> None:
            queries, douts, keys, weights, dlogits = tile
            at, to = slice(a, a + tiles.tile_q), slice(c, c + tiles.tile_k)
            dv_sum[:, to] += product(douts, weights, (0, 1))
            dk_sum[:, to] += product(queries, dlogits, (0, 1))
            dq_sum[step, :, at] += product(keys, dlogits, (0, 0))

        in_flight(tiles, weigh, spread)

    edge = False
    if tail_q:
        edge = i == blocks_q - 1
    if tail_k:
        edge = edge | (j == blocks_k - 1)
    pl.when(i < blocks_q)(lambda: dispatch(problem, tiles, i, j, edge, differentiate))

    @pl.when((j == blocks_k - 1) & (i < blocks_q))
    def _():
        dq[...] = (dq_sum[step] * problem.scale).T.astype(dq.dtype)

    @pl.when(step == per_chunk - 1)
    def _():
        dk[...] = (dk_sum[...] * problem.scale).T.astype(dk.dtype)
        dv[...] = dv_sum[...].T.astype(dv.dtype)
