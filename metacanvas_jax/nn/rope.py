"""Rotary position embedding in the half-split layout, which every network uses.

Channel ``i`` of a head is paired with channel ``i + e/2``. Some published networks pair neighbouring channels instead.
For these the output channels of the q and k projections are permuted at import, which does not change attention.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """``theta ** (-2 i / width)`` for ``i < width / 2``, in float64."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def grid_rotation(
    positions: Sequence[np.ndarray], widths: Sequence[int], theta: float
) -> tuple[Float[Array, "1 n f"], Float[Array, "1 n f"]]:
    """Cosines and sines ``[1 n e/2]`` for the cells of a grid, row-major, one list of positions per axis.

    Axis ``i`` rotates ``widths[i] / 2`` consecutive pairs, with its own frequencies. Angles are computed in float64 on
    the host, as in diffusers. Only the tables of the single axes become constants of the program.
    """
    shape = tuple(len(axis) for axis in positions)
    angles = [np.outer(axis, inverse_frequencies(width, theta)) for axis, width in zip(positions, widths, strict=True)]

    def spread(tables: list[np.ndarray]) -> Float[Array, "1 n f"]:
        parts = []
        for i, table in enumerate(tables):
            cell = tuple(n if j == i else 1 for j, n in enumerate(shape))
            part = jnp.asarray(table, jnp.float32).reshape(*cell, -1)
            parts.append(jnp.broadcast_to(part, (*shape, table.shape[-1])))
        return jnp.concatenate(parts, axis=-1).reshape(1, math.prod(shape), -1)

    return spread([np.cos(angle) for angle in angles]), spread([np.sin(angle) for angle in angles])


def rotate(
    x: Float[Array, "b n h e"], cos: Float[Array, "#b n f"], sin: Float[Array, "#b n f"]
) -> Float[Array, "b n h e"]:
    """Rotates the pairs ``(i, i + e/2)`` of every head by the angles given as ``[b n e/2]`` (or ``[1 n e/2]``).

    Computed in the dtype of ``cos`` and cast back to that of ``x``.
    """
    cos, sin = jnp.expand_dims(cos, 2), jnp.expand_dims(sin, 2)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
