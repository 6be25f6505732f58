"""Code of both kernels of flash attention: the static problem, its blocks, its mask, the loop over tiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from metacanvas_jax.kernels.tiles import LANES, Tiles
from metacanvas_jax.nn.precision import exact

HIDDEN = -1e30  # logit of a key that is not seen
TINY = 1e-37


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static description of one call.

    A product times ``scale`` is a natural logit; times ``factor`` it is a base-2 logit. ``query_ids`` and ``key_ids``
    say whether these segment ids are given. ``chunk`` is the number of queries whose gradient the backward kernel keeps
    on the chip. ``vmem`` is the number of bytes that a kernel may use.
    """

    n: int
    m: int
    width: int
    heads: int
    groups: int
    scale: float
    factor: float
    causal: bool
    offset: int
    query_ids: bool
    key_ids: bool
    forward: Tiles
    backward: Tiles
    chunk: int
    vmem: int
    interpret: bool | pltpu.InterpretParams

    def blocks(self, tiles: Tiles) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.n // tiles.block_q), -(-self.m // tiles.block_k)


def product(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contracts axis ``over[0]`` of x with axis ``over[1]`` of y in float32, at full precision for float32 inputs."""
    precision = exact(x, y) or jax.lax.Precision.DEFAULT
    dims = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def specs(problem: Problem, tiles: Tiles, place: Callable) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, list]:
    """Blocks of ``[b n (h e)]``, of ``[b m (g e)]``, of ``[b h 1 n]``, and of the ids ``[b 1 n]``, ``[b 1 m]`` given.

    ``place`` maps grid indices (and the scalars fetched before) to (sample, head, block of queries, block of keys).
    """
    share = problem.heads // problem.groups

    def at(pick: Callable) -> Callable:
        return lambda *grid: pick(*place(*grid))

    rows = pl.BlockSpec((None, tiles.block_q, problem.width), at(lambda b, h, i, j: (b, i, h)))
    columns = pl.BlockSpec((None, tiles.block_k, problem.width), at(lambda b, h, i, j: (b, j, h // share)))
    values = pl.BlockSpec((None, None, 1, tiles.block_q), at(lambda b, h, i, j: (b, h, 0, i)))
    ids = []
    if problem.query_ids:
        ids.append(pl.BlockSpec((None, 1, tiles.block_q), at(lambda b, h, i, j: (b, 0, i))))
    if problem.key_ids:
        ids.append(pl.BlockSpec((None, 1, tiles.block_k), at(lambda b, h, i, j: (b, 0, j))))
    return rows, columns, values, ids


def last_seen(problem: Problem, tiles: Tiles, i: Any) -> Any:
    """The last block of keys in which block ``i`` of queries sees a key (block 0 if it sees none)."""
    last = problem.blocks(tiles)[1] - 1
    if not problem.causal:
        return last
    return jnp.clip(((i + 1) * tiles.block_q - 1 + problem.offset) // tiles.block_k, 0, last)


def first_seeing(problem: Problem, tiles: Tiles, j: Any) -> Any:
    """The first block of queries that sees a key of block ``j`` of keys (the last block if none does)."""
    if not problem.causal:
        return 0
    return jnp.clip((j * tiles.block_k - problem.offset) // tiles.block_q, 0, problem.blocks(tiles)[0] - 1)


def dispatch(problem: Problem, tiles: Tiles, i: Any, j: Any, edge: Any, work: Callable[[bool], None]) -> None:
    """Calls ``work(masked)`` on block ``(i, j)``: with a mask if it crosses a border, not at all if nothing is visible.

    ``edge`` says whether the block extends beyond an array; True masks every block.
    """
    straddles = edge
    seen = True
    if problem.causal:
        first, end = i * tiles.block_q + problem.offset, (i + 1) * tiles.block_q + problem.offset
        seen = j * tiles.block_k < end
        straddles = edge | ((j + 1) * tiles.block_k - 1 > first)
    if problem.key_ids or edge is True:
        pl.when(seen)(lambda: work(True))
        return
    if straddles is not False:
        pl.when(straddles & seen)(lambda: work(True))
        seen = jnp.logical_not(straddles) & seen
    pl.when(seen)(lambda: work(False))


def visible(problem: Problem, tiles: Tiles, i: Any, j: Any, a: int, c: int, query_ids: Any, key_ids: Any) -> jax.Array:
    """The visible pairs of tile ``(a, c)`` of block ``(i, j)``, ``[tile_k tile_q]``.

    ``query_ids`` is ``[1 block_q]`` or None; ``key_ids`` is ``[block_k LANES]`` as made by ``column``, or None.
    """
    shape = (tiles.tile_k, tiles.tile_q)
    key = j * tiles.block_k + c + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = i * tiles.block_q + a + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (key < problem.m) & (query < problem.n)
    if problem.causal:
        seen &= key <= query + problem.offset
    if key_ids is not None:
        own = jnp.concatenate([key_ids[c : c + tiles.tile_k]] * (tiles.tile_q // LANES), axis=1)
        seen &= own == (0 if query_ids is None else query_ids[:, a : a + tiles.tile_q])
    return seen


def column(ids: jax.Array) -> jax.Array:
    """``[1 m]`` to ``[m LANES]``, the same in every lane."""
    return jnp.broadcast_to(ids, (LANES, ids.shape[1])).T


def rows(ref: Any, start: int, size: int, valid: Any) -> jax.Array:
    """Rows of a block. Unless ``valid`` is None, rows from number ``valid`` on (beyond the array) are zeros."""
    x = ref[start : start + size]
    if valid is None:
        return x
    row = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < valid, x, jnp.zeros_like(x))


def in_flight(tiles: Tiles, first: Callable[[int, int], Any], second: Callable[[int, int, Any], None]) -> None:
    """Calls ``first`` on every tile of a block, and ``second`` on a tile after ``depth`` further calls of ``first``.

    The compiler keeps the order of matrix products. This order lets the exponentials of one tile overlap the products
    of other tiles.
    """
    waiting = []
    for a in range(0, tiles.block_q, tiles.tile_q):
        for c in range(0, tiles.block_k, tiles.tile_k):
            waiting.append((a, c, first(a, c)))
            if len(waiting) > tiles.depth:
                second(*waiting.pop(0))
    for one in waiting:
        second(*one)
