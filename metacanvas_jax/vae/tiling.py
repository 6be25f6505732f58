"""Coding pictures in overlapping tiles, one after the other, so that memory depends on the tile and not on the picture.

A network with attention or norms over the whole picture gives other numbers for a tile: the result is near that of
coding at once, not equal to it. Overlaps are blended linearly.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Network = Callable[[Array], Array]


def tiled_decode(
    decode: Network, latents: Float[Array, "b t h w c"], *, spatial: int, tile: int, overlap: int
) -> Float[Array, "b T H W 3"]:
    """``decode(latents)`` by tiles of ``tile`` x ``tile`` latents that share at least ``overlap`` of them.

    ``spatial`` is the number of pixels per latent. Raises ValueError unless ``0 <= overlap < tile``.
    """
    return _tiled(decode, latents, 1, spatial, tile, overlap)


def tiled_encode(
    encode: Network, video: Float[Array, "b t h w 3"], *, spatial: int, tile: int, overlap: int
) -> Float[Array, "b T H W c"]:
    """``encode(video)`` by tiles; ``tile`` and ``overlap`` are given in latents here, too.

    Raises ValueError unless ``0 <= overlap < tile``.
    """
    return _tiled(encode, video, spatial, 1, tile, overlap)


def tile_starts(length: int, tile: int, overlap: int) -> np.ndarray:
    """Where the tiles of a row of ``length`` begin: as few as can be, evenly spread, the last ending with the row."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    return np.round(np.linspace(0, max(length - tile, 0), count)).astype(np.int32)


def blend_weights(starts: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Weights ``[tiles, tile]`` that rise and fall linearly over the overlap; everywhere in the row they sum to one."""
    ramp = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).clip(max=max(overlap, 1)).astype(np.float64)
    total = np.zeros(int(starts[-1]) + tile)
    for start in starts:
        total[start : start + tile] += ramp
    return np.stack([ramp / total[start : start + tile] for start in starts]).astype(np.float32)


def _tiled(network: Network, x: Array, inward: int, outward: int, tile: int, overlap: int) -> Array:
    """Tiles on a grid whose cells are ``inward`` wide in the input and ``outward`` wide in the output."""
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} must lie in 0 .. tile - 1 = {tile - 1}")
    cells = [side // inward for side in x.shape[2:4]]
    tiles = [min(tile, side) for side in cells]
    starts = [tile_starts(side, size, min(overlap, size - 1)) for side, size in zip(cells, tiles, strict=True)]
    weights = [blend_weights(s * outward, n * outward, overlap * outward) for s, n in zip(starts, tiles, strict=True)]
    row, column = (grid.ravel() for grid in np.meshgrid(*(np.arange(len(s)) for s in starts), indexing="ij"))

    size = (*x.shape[:2], *(n * inward for n in tiles), x.shape[-1])
    shape = jax.eval_shape(network, jax.ShapeDtypeStruct(size, x.dtype))
    whole = (*shape.shape[:2], *(side * outward for side in cells), shape.shape[-1])

    def step(total: Array, one: tuple[Array, ...]) -> tuple[Array, None]:
        top, left, rows, columns = one
        y = network(jax.lax.dynamic_slice(x, (0, 0, top * inward, left * inward, 0), size)).astype(jnp.float32)
        y = y * rows[None, None, :, None, None] * columns[None, None, None, :, None]
        place = (0, 0, top * outward, left * outward, 0)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, place, y.shape) + y, place), None

    each = (starts[0][row], starts[1][column], weights[0][row], weights[1][column])
    total, _ = jax.lax.scan(step, jnp.zeros(whole, jnp.float32), jax.tree.map(jnp.asarray, each))
    return total.astype(shape.dtype)
