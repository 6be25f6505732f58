"""Flash attention on TPU, forward and backward, without a running maximum where the logits allow it.

If ``|q| |k| scale`` is small for every pair, as in networks that normalise q and k, ``2 ** logit`` neither overflows
nor underflows. The maximum is then fixed at zero, without comparisons and without rescaling. The bound is computed from
q and k for every head. A head that exceeds the limit uses the online softmax inside the same kernel.

Scores are stored as ``[keys queries]``. The sums and the log-sum-exp of queries are then rows, whose broadcast is free.
The score tile is the stationary operand of every later product and fills a matrix unit of 256 x 256; a head of 128
would leave half of it idle. Design, bound and measurements: docs/kernels.md. Sources: Dao, "FlashAttention-2"
(arXiv 2307.08691), and the splash attention of JAX and Tokamax.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.flash_backward import backward_pass
from metacanvas_jax.kernels.flash_common import (
    HIDDEN,
    TINY,
    Problem,
    column,
    dispatch,
    in_flight,
    last_seen,
    product,
    rows,
    specs,
    visible,
)
from metacanvas_jax.kernels.masks import MaskSpec
from metacanvas_jax.kernels.row_products import row_products
from metacanvas_jax.kernels.tiles import LANES, Tiles

LIMIT = 80.0  # of base-2 logits: sums stay below 2 ** 97 for 100,000 keys, single weights above 2 ** -80
LOWEST = -1e29  # start of the running maximum: a query that sees no key gets weights 2 ** (HIDDEN - LOWEST) = 0
SUBLANES = 8
NOBODY = -(2**31)  # segment of padding keys


def flash_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m g e"],
    v: Float[Array, "b m g e"],
    *,
    mask: MaskSpec | None = None,
    scale: float | None = None,
    generation: str | None = None,
    forward: Tiles | None = None,
    backward: Tiles | None = None,
    chunk: int | None = None,
    bounded: Int[Array, "b h"] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "b n h e"]:
    """Softmax attention with grouped heads; differentiable in q, k and v; zeros for a query that sees no key.

    Products and sums are float32 for every dtype of the inputs. By default tiles are those of ``tiles.json`` for
    ``generation`` (that of the target device), ``bounded`` is the result of ``fixed_max_holds``, and ``chunk`` (the
    number of queries whose gradient stays on the chip in the backward pass) is as large as the chip allows.
    """
    n, h, e = q.shape[1:]
    m, g = k.shape[1:3]
    mask = mask or MaskSpec()
    scale = e**-0.5 if scale is None else scale
    generation = generation or tiling.generation_of()
    width = -(-e // LANES) * LANES
    backward = (backward or tiling.tiles_for("backward", generation, width)).fit(n, m)
    query_ids, key_ids = mask.query_segments, mask.key_segments
    if mask.keys is not None:
        key_ids = jnp.where(mask.keys, 0 if key_ids is None else key_ids, NOBODY)
    problem = Problem(
        n=n,
        m=m,
        width=width,
        heads=h,
        groups=g,
        scale=scale,
        factor=scale * math.log2(math.e),
        causal=mask.causal,
        offset=mask.offset,
        query_ids=query_ids is not None,
        key_ids=key_ids is not None,
        forward=(forward or tiling.tiles_for("forward", generation, width)).fit(n, m),
        backward=backward,
        chunk=chunk or tiling.chunk_queries(backward, width, n, generation, q.dtype.itemsize),
        vmem=tiling.usable(generation),
        interpret=interpret,
    )
    ids = [x.astype(jnp.int32)[:, None] for x in (query_ids, key_ids) if x is not None]

    def flat(x: jax.Array) -> jax.Array:  # [b n h e] -> [b n (h e)]: a block of it is the rows of one head
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - e))) if width != e else x
        return x.reshape(*x.shape[:2], -1)

    queries, keys, values = flat(q), flat(k), flat(v)
    if bounded is None:
        bounded = fixed_max_holds(queries, keys, (h, g), problem.factor, interpret)
    out = _flash(problem, queries, keys, values, bounded.reshape(-1), ids)
    return out.reshape(q.shape[0], n, h, width)[..., :e]


def fixed_max_holds(
    q: Float[Array, "b n d"],
    k: Float[Array, "b m c"],
    heads: tuple[int, int],
    factor: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> Int[Array, "b h"]:
    """1 for each head whose bound on base-2 logits (Cauchy-Schwarz, ``max |q| max |k| factor``) is at most ``LIMIT``.

    ``heads`` are the numbers of heads of q and of k.
    """

    def largest(x: jax.Array, count: int) -> jax.Array:
        return jnp.sqrt(jnp.max(row_products(x, x, count, interpret), axis=(2, 3)))

    q, k = jax.lax.stop_gradient((q, k))
    bound = largest(q, heads[0]) * jnp.repeat(largest(k, heads[1]), heads[0] // heads[1], axis=1) * abs(factor)
    return (bound <= LIMIT).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, bounded: jax.Array, ids: list) -> jax.Array:
    return forward_pass(problem, q, k, v, bounded, ids)[0]


def _forward_rule(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, bounded: jax.Array, ids: list):
    out, lse = forward_pass(problem, q, k, v, bounded, ids)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, ids, out, lse)


def _backward_rule(problem: Problem, saved, dout: jax.Array):
    q, k, v, ids, out, lse = saved
    return *backward_pass(problem, q, k, v, ids, out, lse, dout), None, None


_flash.defvjp(_forward_rule, _backward_rule)


def forward_pass(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, bounded: jax.Array, ids: list):
    """Output ``[b n (h e)]`` and base-2 log-sum-exp ``[b h 1 n]`` of inputs ``[b n (h e)]``, ``[b m (g e)]``."""
    tiles, samples = problem.forward, q.shape[0]

    def place(b, h, i, j, *_):
        return b, h, i, jnp.minimum(j, last_seen(problem, tiles, i))

    own, other, value, given = specs(problem, tiles, place)
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    pairs = samples * problem.heads * problem.n * problem.m
    return pl.pallas_call(
        functools.partial(_forward_kernel, problem),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(samples, problem.heads, *problem.blocks(tiles)),
            in_specs=[own, other, other, *given],
            out_specs=[own, value],
            scratch_shapes=[
                f32((problem.width, tiles.block_q)),
                f32((SUBLANES, tiles.block_q)),
                f32((1, tiles.block_q)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((samples, problem.heads, 1, problem.n), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=problem.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * problem.width,
            bytes_accessed=2 * q.nbytes + (k.nbytes + v.nbytes) * problem.blocks(tiles)[0],
            transcendentals=pairs,
        ),
        interpret=problem.interpret,
        name="flash_attention_forward",
    )(bounded, q, k, v, *ids)


def _forward_kernel(problem: Problem, bounded, q, k, v, *refs) -> None:
    tiles, refs = problem.forward, list(refs)
    query_ids = refs.pop(0) if problem.query_ids else None
    key_ids = refs.pop(0) if problem.key_ids else None
    out, lse, acc, total, top = refs
    i, j = pl.program_id(2), pl.program_id(3)
    end = problem.blocks(tiles)[1] - 1
    tail = problem.m % tiles.block_k
    fixed = bounded[pl.program_id(0) * problem.heads + pl.program_id(1)] > 0

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, jnp.where(fixed, 0.0, LOWEST))

    def attend(online: bool, masked: bool) -> None:
        # In this problem only the end of the keys needs a mask, so tiles behind it are not computed.
        only_tail = masked and not online and tail and not problem.causal and key_ids is None
        ids = column(key_ids[...]) if masked and key_ids is not None else None
        valid = problem.m - j * tiles.block_k if masked and tail else None

        def weigh(a: int, c: int):
            if only_tail and c >= tail:
                return None
            at = slice(a, a + tiles.tile_q)
            logits = product(k[c : c + tiles.tile_k], q[at], (1, 1))
            if problem.factor != 1.0:
                logits = logits * problem.factor
            if masked:
                own = None if query_ids is None else query_ids[...]
                logits = jnp.where(visible(problem, tiles, i, j, a, c, own, ids), logits, HIDDEN)
            shrink = None
            if online:
                before = top[:, at]
                top[:, at] = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
                shrink = jnp.exp2(before - top[:, at])
                total[:, at] = total[:, at] * shrink
                logits = logits - top[:, at]
            weights = jnp.exp2(logits)
            total[:, at] += _fold(weights)
            return weights.astype(v.dtype), shrink

        def gather(a: int, c: int, tile) -> None:
            if tile is None:
                return
            weights, shrink = tile
            at = slice(a, a + tiles.tile_q)
            found = product(rows(v, c, tiles.tile_k, valid), weights, (0, 0))
            acc[:, at] = (acc[:, at] if shrink is None else acc[:, at] * shrink) + found

        in_flight(tiles, weigh, gather)

    edge = (j == end) if tail else False
    pl.when(fixed)(lambda: dispatch(problem, tiles, i, j, edge, functools.partial(attend, False)))
    # The online softmax is the rare case. It always masks: one region of code compiles faster than two.
    pl.when(jnp.logical_not(fixed))(lambda: dispatch(problem, tiles, i, j, True, functools.partial(attend, True)))

    @pl.when(j == end)
    def _():
        summed = jnp.maximum(jnp.sum(total[...], axis=0, keepdims=True), TINY)
        out[...] = (acc[...] * (1.0 / summed)).T.astype(out.dtype)
        lse[...] = jnp.log2(summed) + top[...]


def _fold(x: jax.Array) -> jax.Array:
    """Sums every eighth row: this adds registers and moves no data between sublanes."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)
