"""ReLU linear attention on NVIDIA GPUs (Pallas Triton): every array is read once and written once.

One program computes one head of one sample (or frame). The memory of a head is the ``[e e]`` sum of ``relu(k)^T v``. It
stays in registers: it is summed over keys and values, then multiplied with the queries. The forward pass saves it, so
that the backward pass can read first q and dout, then k and v, each once. Products take 16-bit operands unchanged and
sum in float32. A float32 intermediate is split into two 16-bit halves, so that only the results are rounded. Float32
inputs use float32 products.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

EPS = 1e-15
BLOCK = 64  # tokens that are loaded at once
WARPS = 4
STAGES = 3  # blocks that are being copied while one is computed
WIDTHS = (16, 32)  # of a head: powers of two, as Triton requires, at least 16 for a product, small enough for registers
F32 = jnp.float32


def takes(q: jax.Array, v: jax.Array) -> bool:
    """Whether the kernels support this call: keys and values of the same width, one of ``WIDTHS``."""
    return q.shape[-1] == v.shape[-1] and q.shape[-1] in WIDTHS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "b n h e"]:
    """See ``linear_attention.relu_linear_attention``. ``block``, a power of two, is the tokens of one load."""
    return _forward(q, k, v, block, interpret, keep=False)[0]


def _forward_rule(q: jax.Array, k: jax.Array, v: jax.Array, block: int, interpret: bool):
    out, memory, weight = _forward(q, k, v, block, interpret, keep=True)
    return out, (q, k, v, memory, weight)


def _backward_rule(block: int, interpret: bool, saved: tuple, dout: jax.Array):
    return _backward(*saved, dout, block, interpret)


linear_attention.defvjp(_forward_rule, _backward_rule)


def _times(a: jax.Array, b: jax.Array, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """``a @ b`` in float32, where ``a`` has the dtype of the inputs and ``b`` either that or float32."""
    dot = functools.partial(plgpu.dot, trans_a=trans_a, trans_b=trans_b)
    if a.dtype == b.dtype:
        return dot(a, b, precision=jax.lax.Precision.HIGHEST if a.dtype == F32 else None)
    high = b.astype(a.dtype)
    return dot(a, high) + dot(a, (b - high.astype(F32)).astype(a.dtype))


def _block(step: jax.Array, block: int, count: int) -> tuple:
    """Rows of a block, and a mask of those that are tokens."""
    rows = pl.ds(step * block, block)
    return rows, (step * block + jnp.arange(block) < count)[:, None]


def _load(ref, rows, inside: jax.Array) -> jax.Array:
    view = ref.at[rows, :]
    return plgpu.load(view, mask=jnp.broadcast_to(inside, view.shape), other=0.0)


def _store(ref, rows, inside: jax.Array, x: jax.Array) -> None:
    plgpu.store(ref.at[rows, :], x.astype(ref.dtype), mask=jnp.broadcast_to(inside, x.shape))


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, block: int, interpret: bool, keep: bool) -> tuple:
    (n, e), m = (q.shape[1], q.shape[3]), k.shape[1]

    def linear_attention_forward(q, k, v, out, *kept) -> None:
        def gather(step, sums):
            memory, weight = sums
            rows, inside = _block(step, block, m)
            keys, values = jax.nn.relu(_load(k, rows, inside)), _load(v, rows, inside)
            return memory + _times(keys, values, trans_a=True), weight + jnp.sum(keys.astype(F32), axis=0)

        sums = jnp.zeros((e, e), F32), jnp.zeros((e,), F32)
        memory, weight = jax.lax.fori_loop(0, pl.cdiv(m, block), gather, sums)
        if keep:
            kept[0][...], kept[1][...] = memory, weight

        def read(step, _):
            rows, inside = _block(step, block, n)
            queries = jax.nn.relu(_load(q, rows, inside))
            norm = jnp.sum(queries.astype(F32) * weight[None], axis=1, keepdims=True) + EPS
            _store(out, rows, inside, _times(queries, memory) / norm)

        jax.lax.fori_loop(0, pl.cdiv(n, block), read, None)

    results, specs = [q], [_rows(q)]
    if keep:
        b, _, h, _ = q.shape
        results += [jax.ShapeDtypeStruct((b, h, e, e), F32), jax.ShapeDtypeStruct((b, h, e), F32)]
        specs += _sums(e)
    return _call(linear_attention_forward, [q, k, v], [_rows(x) for x in (q, k, v)], results, specs, interpret)


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: jax.Array,
    weight: jax.Array,
    dout: jax.Array,
    block: int,
    interpret: bool,
) -> tuple:
    (n, e), m = (q.shape[1], q.shape[3]), k.shape[1]

    def linear_attention_backward(q, k, v, memory, weight, dout, dq, dk, dv) -> None:
        memory, weight = memory[...], weight[...]

        def of_queries(step, sums):
            dmemory, dweight = sums
            rows, inside = _block(step, block, n)
            raw, grad = _load(q, rows, inside), _load(dout, rows, inside)
            queries = jax.nn.relu(raw)
            inverse = 1.0 / (jnp.sum(queries.astype(F32) * weight[None], axis=1, keepdims=True) + EPS)
            found = _times(queries, memory) * inverse
            dtotal = grad.astype(F32) * inverse
            dnorm = -jnp.sum(dtotal * found, axis=1, keepdims=True)
            dqueries = _times(grad, memory, trans_b=True) * inverse + dnorm * weight[None]
            _store(dq, rows, inside, jnp.where(raw > 0, dqueries, 0.0))
            dmemory = dmemory + _times(queries, dtotal, trans_a=True)
            return dmemory, dweight + jnp.sum(queries.astype(F32) * dnorm, axis=0)

        sums = jnp.zeros((e, e), F32), jnp.zeros((e,), F32)
        dmemory, dweight = jax.lax.fori_loop(0, pl.cdiv(n, block), of_queries, sums)

        def of_keys(step, _):
            rows, inside = _block(step, block, m)
            raw, values = _load(k, rows, inside), _load(v, rows, inside)
            dkeys = _times(values, dmemory, trans_b=True) + dweight[None]
            _store(dk, rows, inside, jnp.where(raw > 0, dkeys, 0.0))
            _store(dv, rows, inside, _times(jax.nn.relu(raw), dmemory))

        jax.lax.fori_loop(0, pl.cdiv(m, block), of_keys, None)

    specs = [_rows(x) for x in (q, k, v)]
    in_specs = [*specs, *_sums(e), _rows(dout)]
    return _call(linear_attention_backward, [q, k, v, memory, weight, dout], in_specs, [q, k, v], specs, interpret)


def _rows(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """All tokens of one head, of ``[b n h e]``."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda head, sample: (sample, 0, head, 0))


def _sums(e: int) -> list[pl.BlockSpec]:
    """Memory ``[b h e e]`` and weight ``[b h e]`` of one head."""
    memory = pl.BlockSpec((None, None, e, e), lambda head, sample: (sample, head, 0, 0))
    return [memory, pl.BlockSpec((None, None, e), lambda head, sample: (sample, head, 0))]


def _call(kernel: Callable, inputs: list, in_specs: list, results: list, out_specs: list, interpret: bool) -> tuple:
    """Runs ``kernel`` for every head of every sample. Heads come first in the grid, as neighbours in memory."""
    b, _, h, _ = inputs[0].shape
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(h, b),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            interpret=interpret,
            name=kernel.__name__,
        )(*inputs)
    )
