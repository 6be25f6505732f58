"""What vision towers share: the order of patches, their rotary angles and the check of their number."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from metacanvas_jax.nn.rope import inverse_frequencies
from metacanvas_jax.types import Grid

ROPE_THETA = 1e4


def check_patches(shape: Sequence[int], grid: Grid, values: int, merge: int) -> None:
    """Raises ValueError unless patches of ``shape`` ``[b p q]`` fill ``grid``, whose sides ``merge`` divides."""
    t, h, w = grid
    if tuple(shape[1:]) != (t * h * w, values) or h % merge or w % merge:
        raise ValueError(
            f"{shape[1]} patches of {shape[2]} values do not make a grid {grid} of {values}"
            f" values each with sides divisible by {merge}"
        )


def patch_coordinates(rows: int, columns: int, merge: int) -> Int[np.ndarray, "2 p"]:
    """Row and column of every patch in merge-block order; ``rows`` and ``columns`` count patches."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    return rearrange(grid, "two (i h) (j w) -> two (i j h w)", h=merge, w=merge)


def patch_angles(coordinates: Int[np.ndarray, "2 p"], head_width: int) -> Float[Array, "1 p f"]:
    """Rotary angles of patches: one half of the frequencies of a head turns with the row, the other with the column."""
    frequencies = jnp.asarray(inverse_frequencies(head_width // 2, ROPE_THETA), jnp.float32)
    places = jnp.asarray(rearrange(coordinates, "two p -> p two 1"), jnp.float32)
    return rearrange(places * frequencies[None, None], "p two f -> 1 p (two f)")
