"""How a request is read: the task, the shape of the result, pictures and frames, as ``metacanvas sample`` and ``edit``.

The numbers are data of the export (section ``reading`` of its index); this file and ``sizes.py`` apply them.
Only numpy and Pillow are used.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from metacanvas_jax.errors import UserError
from metacanvas_jax.images import MODES, to_rgb
from metacanvas_jax.sizes import fitting_size, latent_grid, nearest_size

VERSION = 1
VIDEOS = ("text_to_video", "image_to_video", "video_editing", "reference_to_video")
EDITS = ("image_editing", "video_editing")
FRAMES = {"target": 2.0, "least": 4, "most": 768, "multiple": 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is painted: a task, (rows, columns) in pixels, frames and their rate; ``length`` is that of prompts."""

    task: str
    size: tuple[int, int]
    frames: int
    fps: float
    length: int


class Rules:
    """The reading rules of an export.

    Attributes:
        shapes: the shapes that the run was trained in.
        unit: pixels that the sides of a result are multiples of.
        temporal: frames of a video are 1 + ``temporal`` k.
        frames: which frames of a video the MLLM reads (see ``shown_frames``).
        by_size: the tasks of which a result has the trained size nearest to its source.
    """

    def __init__(self, index: Mapping[str, Any], patch: Sequence[int]):
        """Raises UserError for rules of a version that is not known here."""
        rules = index.get("reading") or older(index, patch)
        if rules["version"] != VERSION:
            raise UserError(f"the export has reading rules of version {rules['version']}, expected {VERSION}")
        self.shapes = [Shape(**{**shape, "size": tuple(shape["size"])}) for shape in rules["shapes"]]
        self.unit, self.frames, self.by_size = rules["unit"], rules["frames"], rules.get("by_size", [])
        self.spatial, self.temporal = index["vae"]["spatial"], index["vae"]["temporal"]

    def makes_video(self, frames: int | None) -> bool:
        """Whether a result of so many frames (None: as trained) is a video."""
        return (self.shapes[0].frames if frames is None else frames) > 1

    def shape(
        self,
        task: str,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        source: Image.Image | None = None,
    ) -> Shape:
        """The shape of a result: the trained one of its task, or the nearest, as the request changes it.

        An edit has the aspect ratio of its ``source``, or the nearest of the sizes that its task was trained in where
        that was sorted by size. Raises UserError for sizes and frames that cannot be painted.
        """
        video = task in VIDEOS
        kin = [shape for shape in self.shapes if shape.task == task]
        kin = kin or [shape for shape in self.shapes if (shape.task in VIDEOS) == video]
        nearest = (kin or self.shapes)[0]
        if source is not None and height is None and width is None:
            sides = source.height, source.width
            if task in self.by_size:
                size = nearest_size(sides, [shape.size for shape in kin])
                nearest = next(shape for shape in kin if shape.size == size)
            elif task in EDITS:
                size = fitting_size(sides, math.prod(nearest.size), self.unit)
                nearest = dataclasses.replace(nearest, size=size)
        size, frames = nearest.size, frames or (nearest.frames if video else 1)
        rows, columns = height or size[0], width or size[1]
        if rows % self.unit or columns % self.unit or (frames - 1) % self.temporal:
            raise UserError(
                f"{frames} frames of {rows} x {columns} pixels: expected 1 + {self.temporal} k frames and sides that "
                f"are multiples of {self.unit}"
            )
        if video != (frames > 1):
            raise UserError(f"{task} makes one {'video' if video else 'image'}, which {frames} frames are not")
        return dataclasses.replace(nearest, task=task, size=(rows, columns), frames=frames)

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents of a shape."""
        return latent_grid(shape.size, shape.frames, spatial=self.spatial, temporal=self.temporal)


def older(index: Mapping[str, Any], patch: Sequence[int]) -> dict[str, Any]:
    """The rules of an export of version 0.1, which has no section ``reading``: one shape, that of its latents."""
    spatial, prompt = index["vae"]["spatial"], index["prompt"] or {}
    t, h, w = index["latents"]
    frames = (t - 1) * index["vae"]["temporal"] + 1
    shape = {
        "task": "text_to_image" if frames == 1 else "text_to_video",
        "size": [h * spatial, w * spatial],
        "frames": frames,
        "fps": 24.0,
        "length": prompt.get("length", 1),
    }
    return {
        "version": VERSION,
        "shapes": [shape],
        "unit": spatial * math.lcm(*patch[1:]),
        "frames": FRAMES | {"target": prompt.get("video_fps", FRAMES["target"])},
    }


def picture(image: Image.Image) -> Image.Image:
    """A picture in RGB, upright as its EXIF data say; what is transparent lies on white.

    Raises UserError for more than 8 bits per channel.
    """
    if image.mode not in MODES:
        raise UserError(f"a picture of mode {image.mode}, expected 8 bits per channel")
    return to_rgb(ImageOps.exif_transpose(image))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB picture scaled until it covers ``size`` (rows, columns) and cropped about its centre."""
    if image.size == (size[1], size[0]):
        return image
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)


def clip(count: int, fps: float, frames: int, rate: float) -> list[int]:
    """Which of ``count`` frames at ``fps`` a second are shown in ``frames`` frames at ``rate`` a second.

    Raises UserError for a video that is too short.
    """
    ratio = fps / rate
    available = 0 if count < 1 else math.floor((count - 1) / ratio + 1e-6) + 1
    if frames > available:
        raise UserError(f"a video of {available} frames at {rate:g} per second, {frames} are needed")
    return np.floor(np.arange(frames) * ratio + 1e-6).astype(int).tolist()


def shown_frames(count: int, fps: float, rules: Mapping[str, Any]) -> tuple[list[int], float]:
    """Which of ``count`` frames the MLLM reads for about ``target`` a second, and the rate that they stand for.

    Their number is a multiple of ``multiple`` and lies between ``least`` and ``most`` as far as the video allows.
    Raises UserError for a video that is shorter than ``multiple``.
    """
    multiple = rules["multiple"]
    most = min(rules["most"], count) // multiple * multiple
    number = int(min(max(count / fps * rules["target"], rules["least"]), most) // multiple) * multiple
    if number < multiple:
        raise UserError(f"a video of {count} frames is too short: {multiple} are needed")
    return np.floor(np.arange(number) * (count / number)).astype(int).tolist(), number / count * fps
