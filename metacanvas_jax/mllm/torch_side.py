"""What the MLLMs share in PyTorch: the prompts that they read, and the positions and masks of a canvas.

The torch side of each MLLM is the class ``Side`` of ``torch_side.py`` in its folder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclasses.dataclass
class Inputs:
    """A batch of prompts, padded on the right; ``media`` are patches, grid ``[1 3]`` and (rows, columns) of tokens."""

    tokens: Tensor  # [b l]
    positions: Tensor  # [3 b l]
    mask: Tensor  # [b l]
    media: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]

    def to(self, device: torch.device) -> "Inputs":
        """The batch on a device."""
        media = [(p.to(device), g.to(device), (i.to(device), j.to(device))) for p, g, (i, j) in self.media]
        return Inputs(self.tokens.to(device), self.positions.to(device), self.mask.to(device), media)


@dataclasses.dataclass
class Context:
    """What the MLLM made of a prompt, and its keys and values, against which the canvas is written."""

    hidden: Tensor  # [b l d], after the final norm
    mask: Tensor  # [b l], True on real tokens
    cache: DynamicCache
    next_position: Tensor  # [b]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask ``[b n m]``, True where attention may look, as transformers adds it to its scores."""
    blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return blocked.masked_fill(~mask, torch.finfo(dtype).min)[:, None]


def canvas_positions(start: Tensor, shape: tuple[int, int, int], config: Mapping[str, Any]) -> Tensor:
    """Positions ``[3 b n]`` of a canvas in raster order: those of an image (one keyframe) or of a video."""
    k, y, x = shape
    count = k * y * x
    if not config["rope"]:
        offsets = torch.arange(count, device=start.device).expand(3, count)
    else:
        grid = {1: (1, 1, count), 2: (1, k * y, x), 3: (k, y, x)}[config["dims"]]
        axes = torch.meshgrid(*(torch.arange(side, device=start.device) for side in grid), indexing="ij")
        time, rows, columns = (axis.flatten() for axis in axes)
        offsets = torch.stack([(time.float() * config["spacing"]).floor().long(), rows, columns])
    return offsets[:, None] + start[None, :, None]
