"""Positions of text, images and videos: three numbers (time, height, width) per token. On the host, in numpy.

On text, all three numbers grow together. An image or video is a block: its tokens count rows and columns from one
common start, and a video counts time in units of ``1 / tokens_per_second``. Two rules exist for the text after a block:

``published``     one after the largest position of the block on any axis, as in the code the weights were trained with
                  (transformers pull request 35569);
``transformers5`` start of the block plus the longer side of its merged grid, as in transformers 5, where text after a
                  long video overlaps the video in time.

For images both rules agree. Under both, what continues a finished sequence (generated text, a canvas) starts one after
the largest position of all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from metacanvas_jax.types import Grid

Rule = Literal["published", "transformers5"]
RULES = get_args(Rule)


@dataclasses.dataclass(frozen=True)
class MediaBlock:
    """An image or video in the sequence: its grid of merged tokens, and the step of time between temporal grids.

    For a video ``step`` is ``tokens_per_second * seconds_per_grid``; an image has one temporal grid and needs none.
    """

    grid: Grid
    step: float = 1.0

    def __post_init__(self):
        if min(self.grid) < 1:
            raise ValueError(f"every side of a media grid must be at least 1, not {self.grid}")
        if self.step < 0:
            raise ValueError(f"time cannot run backwards: step {self.step}")


def block_positions(start: int, block: MediaBlock) -> Int[np.ndarray, "3 r"]:
    """Positions of the tokens of a block in raster order; time is rounded down after multiplying, in float32."""
    time = np.floor(np.arange(block.grid[0], dtype=np.float32) * np.float32(block.step)).astype(np.int32)
    rows, columns = np.arange(block.grid[1], dtype=np.int32), np.arange(block.grid[2], dtype=np.int32)
    return np.stack(np.meshgrid(time, rows, columns, indexing="ij")).reshape(3, -1) + np.int32(start)


def sequence_positions(parts: Sequence[int | MediaBlock], rule: str = "published") -> Int[np.ndarray, "3 n"]:
    """Positions of a sequence given as runs of text (their lengths) and media blocks.

    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown position rule {rule!r}: choose from {RULES}")
    start, out = 0, [np.zeros((3, 0), np.int32)]
    for part in parts:
        if isinstance(part, MediaBlock):
            block = block_positions(start, part)
            start = int(block.max()) + 1 if rule == "published" else start + max(part.grid[1:])
            out.append(block)
        else:
            out.append(np.broadcast_to(np.arange(start, start + part, dtype=np.int32), (3, part)))
            start += part
    return np.concatenate(out, axis=1)
