"""Linear interpolation between grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear_weights(old: int, new: int) -> np.ndarray:
    """The ``[new old]`` matrix of linear interpolation between cell centres, clamped at the borders, no antialiasing.

    Sample ``i`` is read at ``(i + 0.5) * old / new - 0.5``: torch ``interpolate(mode="linear", align_corners=False)``.
    """
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :])).astype(np.float32)


def linear_resize(x: Float[Array, "b *grid d"], grid: tuple[int, ...]) -> Float[Array, "b *new d"]:
    """Interpolates along every axis between the first and the last. An axis that keeps its size is not changed."""
    if len(grid) != x.ndim - 2:
        raise ValueError(f"Cannot resize a grid of {x.ndim - 2} axes to {grid}: give one size per axis.")
    for axis, new in enumerate(grid, start=1):
        if x.shape[axis] != new:
            weights = jnp.asarray(linear_weights(x.shape[axis], new), x.dtype)
            moved = jnp.tensordot(weights, x, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(moved, 0, axis)
    return x
