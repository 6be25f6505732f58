"""What the diffusion transformers of diffusers share: the canvas is added to the output of their patch embedding.

The torch side of each transformer is the class ``Side`` of ``torch_side.py`` in its folder. Latents are
``[b c t h w]`` (an image has t = 1), noise levels lie in [0, 1], and a velocity is noise minus data.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacanvas_jax.errors import UserError

TRAIN_STEPS = 1000
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_tokens": 256, "max_tokens": 4096, "terminal": None}


@dataclasses.dataclass
class Plan:
    """What the transformer reads as text, and the canvas in its width (None without one)."""

    states: Tensor  # [b l d]
    mask: Tensor  # [b l]
    canvas: Tensor | None = None  # [b k y x d]


@dataclasses.dataclass
class Given:
    """Clean latents that a task gives: the source of an edit, the first frame of a video, or references."""

    source: Tensor | None = None  # [b c t h w]
    first: Tensor | None = None  # [b c 1 h w]
    references: tuple[Tensor, ...] = ()  # [b c 1 h w] each


@contextlib.contextmanager
def changed_output(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what ``layer`` returns goes through ``change``."""
    handle = layer.register_forward_hook(lambda _, arguments, output: change(output))
    try:
        yield
    finally:
        handle.remove()


class Backbone:
    """A transformer, the connector, and what both must agree on (``settings`` of the exported folder).

    A subclass is the class ``Side`` of a network's ``torch_side.py``. It names the class of diffusers (``model``) and
    the one that reads files of its adapters (``adapters``), and says whether the transformer reads images (``sees``).
    """

    model: Any
    adapters: Any
    sees = True

    def __init__(self, net: nn.Module, connector: Any, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32):
        self.net: Any = net  # diffusers' classes, whose parts torch's types do not know
        self.connector, self.settings, self.dtype = connector, settings, dtype

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells of one token: frames, rows, columns."""
        raise TypeError(f"{type(self).__name__} has no network")

    def tokens(self, grid: Sequence[int]) -> int:
        """The number of tokens that the transformer makes of a latent grid (frames, rows, columns)."""
        return math.prod(grid) // math.prod(self.patch)

    def velocity(self, latents: Tensor, time: float, plan: Plan, given: Given) -> Tensor:
        """The velocity of ``latents`` at noise level ``time``."""
        if plan.canvas is not None:
            latents = self.connector.canvas_connector.add_to_latents(latents, plan.canvas)
        level = torch.full(latents.shape[:1], time, device=latents.device)
        return self.run(latents.to(self.dtype), level, plan, given).to(latents.dtype)

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """The network itself."""
        raise TypeError(f"{type(self).__name__} has no network")

    def planned(self, grid: Tensor, time: Tensor, plan: Plan) -> Tensor:
        """Patch tokens ``[b t h w d]`` with the canvas on them."""
        if plan.canvas is None:
            return grid
        return self.connector.canvas_connector.add(grid, time, plan.canvas)


class Packed(Backbone):
    """A transformer of images whose tokens are squares of latents: the target's, then those of every reference."""

    name: str  # in messages
    fold = 2  # latents along a side of a token

    @property
    def patch(self) -> tuple[int, int, int]:
        """See ``Backbone``."""
        return (1, self.fold, self.fold)

    def packed(self, latents: Tensor, given: Given) -> tuple[Tensor, list[tuple[int, int]]]:
        """Folded latents of all images along the sequence, and the (rows, columns) of tokens of each.

        Raises UserError for a first frame, which an image does not have.
        """
        if given.first is not None:
            raise UserError(f"{self.name} makes images: it has no first frame")
        images = [latents, *(() if given.source is None else (given.source,)), *given.references]
        images = [image[:, :, 0] for image in images]
        tokens = torch.cat([F.pixel_unshuffle(image, self.fold).flatten(2).transpose(1, 2) for image in images], dim=1)
        return tokens.to(latents.dtype), [
            (image.shape[2] // self.fold, image.shape[3] // self.fold) for image in images
        ]

    def fusing(self, size: tuple[int, int], time: Tensor, plan: Plan) -> Callable[[Tensor], Tensor]:
        """What adds the canvas to the target's tokens, the first of a sequence; ``size`` is its (rows, columns)."""
        count = math.prod(size)

        def fuse(tokens: Tensor) -> Tensor:
            grid = self.planned(tokens[:, :count].unflatten(1, (1, *size)), time, plan)
            return torch.cat([grid.flatten(1, 3), tokens[:, count:]], dim=1)

        return fuse

    def unpacked(self, out: Tensor, size: tuple[int, int]) -> Tensor:
        """The velocity ``[b c 1 h w]`` of the target."""
        grid = out[:, : math.prod(size)].transpose(1, 2).unflatten(2, size)
        return F.pixel_shuffle(grid, self.fold)[:, :, None]


def together(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[b l d]`` that the mask keeps, moved to the front: diffusers numbers them by their place."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return states.gather(1, order[:, :, None].expand(-1, -1, states.shape[2])), mask.gather(1, order)


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels moved towards 1 by a factor on their odds; 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def whole_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Noise levels after the cut to whole timesteps of 1..1000."""
    return (sigmas * TRAIN_STEPS).astype(np.int64) / TRAIN_STEPS


def dynamic(steps: int, tokens: int, config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """FlowMatchEulerDiscreteScheduler with dynamic shifting: the shift grows with the number of tokens painted."""
    config = DYNAMIC | dict(config)
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_tokens"] - config["base_tokens"])
    shift = math.exp(config["base_shift"] + slope * (tokens - config["base_tokens"]))
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = shift / (shift + (1 / grid - 1))
    if config["terminal"] is not None:
        sigmas = 1 - (1 - sigmas) / (1 - sigmas[-1]) * (1 - config["terminal"])
    return sigmas, sigmas
