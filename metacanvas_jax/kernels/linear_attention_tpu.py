"""ReLU linear attention on TPU: every array is read once and written once, forward and backward.

The memory of a head is the sum of ``relu(k)^T v``. Heads are narrow (32 channels) and registers 128 wide, so a group of
128 channels holds several heads. Their memories are the diagonal blocks of one ``[128 128]`` product. The other blocks
are set to zero, so that a product with this matrix acts on each head separately. A grid step holds all tokens of a
sample (or frame) if they fit. Phases follow on the same blocks: sum the memory, then multiply it with the queries.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.flash_common import product
from metacanvas_jax.kernels.tiles import LANES

EPS = 1e-15
MOST_LANES = 512  # channels per grid step: blocks of some hundred KB keep the copies busy
ROWS = 16  # of a packed register
F32 = jnp.float32
Interpret = bool | pltpu.InterpretParams


def takes(q: jax.Array, v: jax.Array) -> bool:
    """Whether the kernels support this call: keys and values of one width, a whole number of heads per 128 channels."""
    return q.shape[-1] == v.shape[-1] and LANES % q.shape[-1] == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    block: int | None = None,
    interpret: Interpret = False,
) -> Float[Array, "b n h e"]:
    """See ``linear_attention.relu_linear_attention``; ``block`` is the largest number of tokens per grid step."""
    return _forward(q, k, v, block, interpret)


def _forward_rule(q: jax.Array, k: jax.Array, v: jax.Array, block: int | None, interpret: Interpret):
    return _forward(q, k, v, block, interpret), (q, k, v)


def _backward_rule(block: int | None, interpret: Interpret, saved: tuple, dout: jax.Array):
    return _backward(*saved, dout, block, interpret)


linear_attention.defvjp(_forward_rule, _backward_rule)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How ``[b n (h e)]`` is cut: ``lanes`` channels and ``block_n`` queries or ``block_m`` keys per grid step."""

    n: int
    m: int
    channels: int
    width: int
    lanes: int
    block_n: int
    block_m: int

    @property
    def steps_n(self) -> int:
        """Blocks of queries."""
        return -(-self.n // self.block_n)

    @property
    def steps_m(self) -> int:
        """Blocks of keys."""
        return -(-self.m // self.block_m)

    def load(self, ref: Any, group: int, block: int, count: int, at: tuple) -> jax.Array:
        """One group of channels of a block, with zeros behind the ``count`` tokens and behind the last channel.

        ``at`` is (block of channels, block of tokens).
        """
        x = ref[:, group * LANES : (group + 1) * LANES]
        if count % block:
            row = at[1] * block + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            x = jnp.where(row < count, x, jnp.zeros_like(x))
        if self.channels % self.lanes:
            start = at[0] * self.lanes + group * LANES
            x = jnp.where(start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < self.channels, x, jnp.zeros_like(x))
        return x

    def queries(self, ref: Any, group: int, at: tuple) -> jax.Array:
        """A group of q, or of an array of its shape, in float32."""
        return self.load(ref, group, self.block_n, self.n, at).astype(F32)

    def keys(self, ref: Any, group: int, at: tuple) -> jax.Array:
        """A group of k or v, without a cast."""
        return self.load(ref, group, self.block_m, self.m, at)

    def same_head(self) -> jax.Array:
        """1 where two channels of a group belong to one head, ``[128 128]``."""
        shape = (LANES, LANES)
        heads = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) // self.width for axis in (0, 1)]
        return jnp.where(heads[0] == heads[1], 1.0, 0.0).astype(F32)


def layout_of(q: jax.Array, k: jax.Array, block: int | None, arrays: int) -> Layout:
    """The layout in which blocks of ``arrays`` arrays, double-buffered, take at most half of the usable VMEM."""
    (n, h, e), m = q.shape[1:], k.shape[1]
    lanes = min(MOST_LANES, -(-h * e // LANES) * LANES)
    generation = tiling.generation_of()
    room = tiling.usable(generation) / 2
    most = int(room // (2 * arrays * lanes * q.dtype.itemsize)) // ROWS * ROWS
    most = max(ROWS, min(most, block or most))
    whole_n, whole_m = -(-n // ROWS) * ROWS, -(-m // ROWS) * ROWS
    return Layout(n, m, h * e, e, lanes, min(most, whole_n), min(most, whole_m))


def _call(
    layout: Layout,
    kernel: Callable,
    name: str,
    phases: int,
    inputs: list[tuple[jax.Array, str, tuple[int, ...]]],
    outputs: list[tuple[jax.Array, str, int]],
    squares: int,
    interpret: Interpret,
) -> list[jax.Array]:
    """Runs ``kernel`` over samples, channels, phases and blocks.

    ``inputs`` and ``outputs`` give for each array whether it is cut like "q" or "k", and the phases that use it. In the
    other phases its block does not change, so that nothing is copied. ``squares`` is the number of pairs of
    ``[128 128]`` and ``[1 128]`` float32 sums per group.
    """

    def spec(kind: str, used: tuple[int, ...]) -> pl.BlockSpec:
        block, steps = {"q": (layout.block_n, layout.steps_n), "k": (layout.block_m, layout.steps_m)}[kind]

        def place(b, c, phase, step):
            at = jnp.minimum(step, steps - 1)
            for other in range(phases):
                if other not in used:
                    at = jnp.where(phase == other, 0 if other < used[0] else steps - 1, at)
            return b, at, c

        return pl.BlockSpec((None, block, layout.lanes), place)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1)

    arrays = [flat(x) for x, _, _ in inputs]
    results = [jax.ShapeDtypeStruct(flat(x).shape, x.dtype) for x, _, _ in outputs]
    groups = layout.lanes // LANES
    sums = [pltpu.VMEM((groups, LANES, LANES), F32), pltpu.VMEM((groups, 1, LANES), F32)]
    grid = (arrays[0].shape[0], -(-layout.channels // layout.lanes), phases, max(layout.steps_n, layout.steps_m))
    moved = sum(x.nbytes for x in arrays) + sum(x.size * x.dtype.itemsize for x in results)
    found = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec(kind, used) for _, kind, used in inputs],
        out_specs=[spec(kind, (used,)) for _, kind, used in outputs],
        out_shape=results,
        scratch_shapes=sums * squares,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiling.usable(tiling.generation_of()),
        ),
        cost_estimate=pl.CostEstimate(
            # FLOPs of the published formula: 2 products (5 backward), each 2 * width per channel of a token.
            flops=(4 if phases == 2 else 10) * arrays[0].size * layout.width,
            bytes_accessed=moved,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(*arrays)
    return [x.reshape(y.shape) for x, (y, _, _) in zip(found, outputs, strict=True)]


def _gather(layout: Layout, at: tuple, k: Any, v: Any, memory: Any, weight: Any) -> None:
    """Phase 0: sums of ``relu(k)^T v`` per head, and of ``relu(k)``."""
    phase, step = pl.program_id(2), at[1]

    @pl.when((phase == 0) & (step == 0))
    def _():
        memory[...] = jnp.zeros_like(memory)
        weight[...] = jnp.zeros_like(weight)

    @pl.when((phase == 0) & (step < layout.steps_m))
    def _():
        for group in range(layout.lanes // LANES):
            keys, values = jax.nn.relu(layout.keys(k, group, at)), layout.keys(v, group, at)
            memory[group] += product(keys, values, (0, 0)) * layout.same_head()
            weight[group] += jnp.sum(keys.astype(F32), axis=0, keepdims=True)


def _read(layout: Layout, queries: jax.Array, memory: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The outputs of queries, and the inverse of the sum of their weights, repeated over the channels of a head."""
    norm = product(queries * weight, layout.same_head(), (1, 0)) + EPS
    return product(queries, memory, (1, 0)) / norm, 1.0 / norm


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, block: int | None, interpret: Interpret) -> jax.Array:
    layout = layout_of(q, k, block, arrays=4)

    def kernel(q, k, v, out, memory, weight) -> None:
        phase, at = pl.program_id(2), (pl.program_id(1), pl.program_id(3))
        _gather(layout, at, k, v, memory, weight)

        @pl.when((phase == 1) & (at[1] < layout.steps_n))
        def _():
            for group in range(layout.lanes // LANES):
                found, _ = _read(layout, jax.nn.relu(layout.queries(q, group, at)), memory[group], weight[group])
                out[:, group * LANES : (group + 1) * LANES] = found.astype(out.dtype)

    inputs, outputs = [(q, "q", (1,)), (k, "k", (0,)), (v, "k", (0,))], [(q, "q", 1)]
    return _call(layout, kernel, "linear_attention_forward", 2, inputs, outputs, 1, interpret)[0]


def _backward(
    q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, block: int | None, interpret: Interpret
) -> tuple[jax.Array, jax.Array, jax.Array]:
    layout = layout_of(q, k, block, arrays=7)

    def kernel(q, k, v, dout, dq, dk, dv, memory, weight, dmemory, dweight) -> None:
        phase, step = pl.program_id(2), pl.program_id(3)
        at = (pl.program_id(1), step)
        _gather(layout, at, k, v, memory, weight)

        @pl.when((phase == 0) & (step == 0))
        def _():
            dmemory[...] = jnp.zeros_like(dmemory)
            dweight[...] = jnp.zeros_like(dweight)

        @pl.when((phase == 1) & (step < layout.steps_n))
        def _():
            for group in range(layout.lanes // LANES):
                raw, grad = layout.queries(q, group, at), layout.queries(dout, group, at)
                queries = jax.nn.relu(raw)
                found, inverse = _read(layout, queries, memory[group], weight[group])
                dtotal = grad * inverse
                dnorm = -product(dtotal * found, layout.same_head(), (1, 0))
                dqueries = product(dtotal, memory[group], (1, 1)) + dnorm * weight[group]
                dq[:, group * LANES : (group + 1) * LANES] = jnp.where(raw > 0, dqueries, 0.0).astype(dq.dtype)
                dmemory[group] += product(queries, dtotal, (0, 0)) * layout.same_head()
                dweight[group] += jnp.sum(queries * dnorm, axis=0, keepdims=True)

        @pl.when((phase == 2) & (step < layout.steps_m))
        def _():
            for group in range(layout.lanes // LANES):
                raw, values = (layout.keys(x, group, at).astype(F32) for x in (k, v))
                dkeys = product(values, dmemory[group], (1, 1)) + dweight[group]
                lanes = slice(group * LANES, (group + 1) * LANES)
                dk[:, lanes] = jnp.where(raw > 0, dkeys, 0.0).astype(dk.dtype)
                dv[:, lanes] = product(jax.nn.relu(raw), dmemory[group], (1, 0)).astype(dv.dtype)

    inputs = [(q, "q", (1,)), (k, "k", (0, 2)), (v, "k", (0, 2)), (dout, "q", (1,))]
    outputs = [(q, "q", 1), (k, "k", 2), (v, "k", 2)]
    return tuple(_call(layout, kernel, "linear_attention_backward", 3, inputs, outputs, 2, interpret))
