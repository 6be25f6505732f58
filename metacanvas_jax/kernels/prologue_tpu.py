"""Norm, rotation and scale of q and k in one pass on TPU: each is read once and written once, forward and backward.

A grid step holds some tokens of all heads. A norm across heads therefore has its whole row, and the table of rotations
is read once for all heads of both arrays.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from metacanvas_jax.hardware import MIB
from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.tiles import LANES

ROWS = 16  # of a packed register
MOST_ROWS = 256
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Prologue:
    """Static options. With ``per_head`` each head of 128 channels is normalised alone, else all channels together."""

    per_head: bool
    eps: float
    scale: float
    interpret: bool | pltpu.InterpretParams = False


def _tables(cos: Any, sin: Any) -> tuple[jax.Array, jax.Array]:
    """Tables ``[n e]`` from ``[n e/2]``, such that ``rotate(x) = x * first + roll(x, e/2) * second``."""
    c, s = cos[...], sin[...]
    return jnp.concatenate([c, c], axis=-1), jnp.concatenate([-s, s], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def prologue(
    problem: Prologue,
    q: Float[Array, "b n d"],
    k: Float[Array, "b n d"],
    q_gain: Float[Array, "1 d"],
    k_gain: Float[Array, "1 d"],
    cos: Float[Array, "s n f"],
    sin: Float[Array, "s n f"],
) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """q and k, normalised and rotated by float32 angles (per sample or shared); q is multiplied by ``scale``.

    All steps are float32, with one rounding at the end. There is one gain per channel. Angles get no gradient.
    """
    return _forward(problem, q, k, q_gain, k_gain, cos, sin)


def _forward_rule(problem: Prologue, *inputs: jax.Array):
    return _forward(problem, *inputs), inputs


def _backward_rule(problem: Prologue, inputs: tuple, grads: tuple):
    dq, dk, dq_gain, dk_gain = _backward(problem, *inputs, *grads)
    return (
        dq,
        dk,
        jnp.sum(dq_gain, axis=0),
        jnp.sum(dk_gain, axis=0),
        jnp.zeros_like(inputs[4]),
        jnp.zeros_like(inputs[5]),
    )


prologue.defvjp(_forward_rule, _backward_rule)


def _normed(problem: Prologue, x: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The heads of a block in float32, and the inverse root mean square of each."""
    heads = [x[:, at : at + LANES].astype(F32) for at in range(0, x.shape[1], LANES)]
    squares = [jnp.sum(head * head, axis=1, keepdims=True) for head in heads]
    if problem.per_head:
        return heads, [jax.lax.rsqrt(square / LANES + problem.eps) for square in squares]
    return heads, [jax.lax.rsqrt(sum(squares) / x.shape[1] + problem.eps)] * len(heads)


def _roll(problem: Prologue, x: jax.Array) -> jax.Array:
    if problem.interpret is True:
        return jnp.roll(x, LANES // 2, axis=1)
    return pltpu.roll(x, LANES // 2, 1)


def _specs(problem: Prologue, q: jax.Array, cos: jax.Array) -> tuple[tuple[int, int], int, Any, Any, Any]:
    samples, n, d = q.shape
    # Six arrays (two inputs, two outputs, two gradients), double-buffered, and float32 copies in flight.
    room = tiling.usable(tiling.generation_of())
    rows = int((room - 2 * MIB) // (d * (12 * q.dtype.itemsize + 16))) // ROWS * ROWS
    rows = max(ROWS, min(MOST_ROWS, rows, -(-n // ROWS) * ROWS))
    own = pl.BlockSpec((None, rows, d), lambda b, i: (b, i, 0))
    gain = pl.BlockSpec((1, d), lambda b, i: (0, 0))
    shared = cos.shape[0] == 1
    table = pl.BlockSpec((None, rows, LANES // 2), lambda b, i: (0 if shared else b, i, 0))
    return (samples, -(-n // rows)), rows, own, gain, table


def _forward(problem: Prologue, q, k, q_gain, k_gain, cos, sin):
    grid, _, own, gain, table = _specs(problem, q, cos)

    def kernel(q, k, q_gain, k_gain, cos, sin, q_out, k_out) -> None:
        first, second = _tables(cos, sin)
        for x, weight, out, scale in ((q, q_gain, q_out, problem.scale), (k, k_gain, k_out, 1.0)):
            for i, (head, inverse) in enumerate(zip(*_normed(problem, x), strict=True)):
                at = slice(i * LANES, (i + 1) * LANES)
                y = head * inverse * (weight[:, at] * scale)
                out[:, at] = (y * first + _roll(problem, y) * second).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[own, own, gain, gain, table, table],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)],
        compiler_params=_params("parallel"),
        cost_estimate=pl.CostEstimate(
            flops=20 * q.size, bytes_accessed=4 * q.nbytes + cos.nbytes + sin.nbytes, transcendentals=0
        ),
        interpret=problem.interpret,
        name="prologue_forward",
    )(q, k, q_gain, k_gain, cos, sin)


def _params(tokens: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", tokens),
        vmem_limit_bytes=tiling.usable(tiling.generation_of()),
    )


def _backward(problem: Prologue, q, k, q_gain, k_gain, cos, sin, dq_out, dk_out):
    grid, rows, own, gain, table = _specs(problem, q, cos)
    n = q.shape[1]

    def kernel(q, k, q_gain, k_gain, cos, sin, dq_out, dk_out, dq, dk, dq_gain, dk_gain) -> None:
        first, second = _tables(cos, sin)
        step = pl.program_id(1)
        row = step * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)

        @pl.when(step == 0)
        def _():
            dq_gain[...] = jnp.zeros_like(dq_gain)
            dk_gain[...] = jnp.zeros_like(dk_gain)

        for x, weight, dout, dx, dweight, scale in (
            (q, q_gain, dq_out, dq, dq_gain, problem.scale),
            (k, k_gain, dk_out, dk, dk_gain, 1.0),
        ):
            heads, inverses = _normed(problem, x)
            grads, inner = [], []
            for i, (head, inverse) in enumerate(zip(heads, inverses, strict=True)):
                at = slice(i * LANES, (i + 1) * LANES)
                dy = dout[:, at].astype(F32)
                dy = (dy * first + _roll(problem, dy * second)) * scale
                found = jnp.where(row < n, dy * head * inverse, 0.0)
                dweight[:, at] += jnp.sum(found, axis=0, keepdims=True)
                grads.append(dy * weight[:, at])
                inner.append(jnp.sum(grads[-1] * head, axis=1, keepdims=True))
            if not problem.per_head:
                inner = [sum(inner)] * len(heads)
            count = LANES if problem.per_head else x.shape[1]
            for i, (head, inverse, grad, mixed) in enumerate(zip(heads, inverses, grads, inner, strict=True)):
                found = inverse * (grad - head * (inverse * inverse * mixed * (1.0 / count)))
                dx[:, i * LANES : (i + 1) * LANES] = found.astype(dx.dtype)

    gains = pl.BlockSpec((None, 1, q.shape[2]), lambda b, i: (b, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[own, own, gain, gain, table, table, own, own],
        out_specs=[own, own, gains, gains],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)),
            *(jax.ShapeDtypeStruct((q.shape[0], 1, q.shape[2]), F32),) * 2,
        ],
        compiler_params=_params("arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=40 * q.size, bytes_accessed=6 * q.nbytes + cos.nbytes + sin.nbytes, transcendentals=0
        ),
        interpret=problem.interpret,
        name="prologue_backward",
    )(q, k, q_gain, k_gain, cos, sin, dq_out, dk_out)
