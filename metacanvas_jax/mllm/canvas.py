"""Canvas tokens: learnable embeddings on a grid, and their positions in the MLLM's sequence (paper, section 3.3).

The MLLM reads a canvas like one more image (one keyframe) or video (several) at the end of the sequence. Only the
positions of its tokens make it so; they follow the block rule of ``positions.py``.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from metacanvas_jax.limits import CANVAS_TOKENS
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.nn.resize import linear_resize
from metacanvas_jax.sizes import canvas_grid
from metacanvas_jax.types import Context, Grid

tokens_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class CanvasConfig:
    """Size and positions of a canvas.

    ``dims`` is the number of position axes: 3 for keyframes, rows and columns; 2 for one image with the rows of all
    keyframes below each other; 1 for one row of all tokens. With ``rope=False`` tokens are numbered like text, on all
    axes together. ``spacing`` is the distance of keyframes in positions: positions per second of the MLLM times the
    seconds from one keyframe to the next. The default puts keyframes one second apart for an MLLM with 2 positions per
    second. An MLLM whose keyframes are blocks of their own (``Mllm.frames_apart``) does not read it. ``start`` is a
    text of as many tokens as the canvas has; training starts from their embeddings (empty: from small random numbers).
    ``bidirectional`` lets canvas tokens attend to each other in both directions; otherwise attention is causal in
    raster order, as in the rest of the sequence.

    ``keyframes``, ``rows`` and ``columns`` are those of the learned embeddings. With ``latents_per_cell`` n the canvas
    has one row for n rows of latents, and one column for n columns (None: the rows and columns of the embeddings for
    latents of any size). A canvas of another size than the embeddings reads them by linear interpolation.

    Raises ValueError for an empty canvas or a negative spacing.
    """

    rows: int
    columns: int
    keyframes: int = 1
    dims: Literal[1, 2, 3] = 3
    rope: bool = True
    spacing: float = 2.0
    start: str = ""
    bidirectional: bool = False
    latents_per_cell: int | None = None

    def __post_init__(self):
        if min(self.shape) < 1:
            raise ValueError(f"a canvas needs at least one keyframe, row and column, not {self.shape}")
        if math.prod(self.shape) > CANVAS_TOKENS:
            raise ValueError(f"a canvas of {math.prod(self.shape)} tokens, at most {CANVAS_TOKENS} are allowed")
        if self.spacing < 0:
            raise ValueError(f"canvas spacing must not be negative: {self.spacing}")

    @property
    def shape(self) -> Grid:
        """(keyframes, rows, columns) of the embeddings."""
        return self.keyframes, self.rows, self.columns

    def shape_for(self, latents: Grid) -> Grid:
        """(keyframes, rows, columns) of the canvas for latents of (frames, rows, columns)."""
        return canvas_grid(self.shape, latents, self.latents_per_cell)


def canvas_positions(
    next_position: Int[Array, " b"], shape: Grid, config: CanvasConfig, *, frames_apart: bool = False
) -> Int[Array, "3 b n"]:
    """Positions ``[3 b n]`` of a canvas of ``shape`` in raster order, starting at ``next_position`` of each sample.

    With ``frames_apart`` (``Mllm.frames_apart``) each keyframe begins one after the largest position of the one before.
    """
    k, y, x = shape
    n = k * y * x
    if not config.rope:
        offsets = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (3, n))
    else:
        grid = {1: (1, 1, n), 2: (1, k * y, x), 3: (k, y, x)}[config.dims]
        offsets = jnp.stack(jnp.meshgrid(*(jnp.arange(side, dtype=jnp.int32) for side in grid), indexing="ij"))
        offsets = offsets.reshape(3, n)
        if frames_apart:
            offsets = offsets.at[0].set(0) + offsets[:1] * max(grid[1:])
        else:
            time = jnp.floor(offsets[0].astype(jnp.float32) * config.spacing).astype(jnp.int32)
            offsets = offsets.at[0].set(time)
    return offsets[:, None] + next_position.astype(jnp.int32)[None, :, None]


def write_canvas(
    mllm: Mllm, tokens: Float[Array, "k y x d"], context: Context, config: CanvasConfig, *, deterministic: bool = True
) -> Float[Array, "b k y x d"]:
    """Hidden states of learnable tokens that the MLLM reads after the prompt, at the positions of ``config``."""
    k, y, x, _ = tokens.shape
    positions = canvas_positions(context.next_position, (k, y, x), config, frames_apart=mllm.frames_apart)
    batch = rearrange(tokens, "k y x d -> 1 (k y x) d").repeat(context.hidden.shape[0], axis=0)
    hidden = mllm.write(batch, positions, context, bidirectional=config.bidirectional, deterministic=deterministic)
    return rearrange(hidden, "b (k y x) d -> b k y x d", k=k, y=y, x=x)


class CanvasTokens(nn.Module):
    """The learnable canvas ``[k y x d]``."""

    config: CanvasConfig
    width: int
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, shape: Grid | None = None) -> Float[Array, "k y x d"]:
        """The tokens, linearly interpolated if another ``shape`` than the configured one is asked for."""
        init = nn.with_logical_partitioning(tokens_init, (None, None, None, "embed"))
        tokens = self.param("tokens", init, (*self.config.shape, self.width))
        return linear_resize(tokens[None], shape or self.config.shape)[0].astype(self.dtype)
