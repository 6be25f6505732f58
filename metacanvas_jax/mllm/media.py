"""Images and videos for a vision tower: resized, normalised, cut into patches. On the host, with numpy and Pillow.

Patches of any size, of images of any size. The defaults, and the arithmetic, are those of the published image and video
processors, without torch and torchvision.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image

from metacanvas_jax.errors import UserError
from metacanvas_jax.images import MODES, to_rgb
from metacanvas_jax.types import Grid

MAX_ASPECT = 200  # sides further apart than this are refused, as in the reference


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """How media become patches. The pixel limits are per image and per video frame.

    With ``tokens`` every image and every pair of frames gets at most that many merged tokens, of nearly its own aspect
    ratio, whatever its size (the paper uses 144); the pixel limits then do not apply. With ``whole_video`` the limits
    of a video hold for all of its frames together. With ``timestamps`` every temporal patch of a video is a block of
    its own in the prompt, after its time in words.
    """

    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    tokens: int | None = None
    image_pixels: tuple[int, int] = (56 * 56, 12845056)
    video_pixels: tuple[int, int] = (128 * 28 * 28, 768 * 28 * 28)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    whole_video: bool = False
    timestamps: bool = False

    def __post_init__(self):
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"the token budget of an image must be at least 1, not {self.tokens}")
        for low, high in (self.image_pixels, self.video_pixels):
            if not 0 < low <= high:
                raise ValueError(f"pixel limits must be 0 < lower <= upper, not ({low}, {high})")

    @property
    def unit(self) -> int:
        """Pixels along the side of a merged token."""
        return self.patch * self.merge

    @property
    def values(self) -> int:
        """Values of one RGB patch."""
        return 3 * self.temporal_patch * self.patch**2


@dataclasses.dataclass(frozen=True)
class Patches:
    """One image or video as input of the vision tower.

    ``seconds`` is the time between two temporal patches of a video, and None for an image. ``times`` are the moments in
    the middle of each temporal patch, in seconds; only prompts with timestamps need them.
    """

    values: Float[np.ndarray, "p q"]
    grid: Grid  # in patches
    seconds: float | None = None
    times: tuple[float, ...] = ()


def resized(
    height: int, width: int, unit: int, limits: tuple[int, int], frames: int = 1, whole: int = 1
) -> tuple[int, int]:
    """Sides in multiples of ``unit`` with an area inside ``limits``, close to the given ones (rounded half to even).

    The area is that of ``frames`` frames together, of which ``whole`` are counted when it is compared with the limits.

    Raises UserError for an empty image or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"cannot read an image of {height} x {width} pixels: sides must be within 1 : {MAX_ASPECT}")
    low, high = limits
    rows, columns = round(height / unit), round(width / unit)
    area = whole * rows * columns * unit**2
    if area > high:
        scale = math.sqrt(frames * height * width / high) * unit
        rows, columns = max(1, math.floor(height / scale)), max(1, math.floor(width / scale))
    elif area < low:
        scale = math.sqrt(low / (frames * height * width)) / unit
        rows, columns = math.ceil(height * scale), math.ceil(width * scale)
    return rows * unit, columns * unit


def budgeted(height: int, width: int, unit: int, tokens: int) -> tuple[int, int]:
    """Sides in multiples of ``unit`` that make at most ``tokens`` merged tokens, of the nearest aspect ratio.

    Raises UserError for an empty image.
    """
    if min(height, width) < 1:
        raise UserError(f"cannot read an image of {height} x {width} pixels")
    rows = min(range(1, tokens + 1), key=lambda rows: abs(math.log(tokens // rows * height / (rows * width))))
    return rows * unit, tokens // rows * unit


def target_size(height: int, width: int, config: MediaConfig, *, frames: int | None = None) -> tuple[int, int]:
    """(height, width) that an image, or a frame of a video of ``frames`` frames, is resized to."""
    if config.tokens is not None:
        return budgeted(height, width, config.unit, config.tokens)
    if frames is None:
        return resized(height, width, config.unit, config.image_pixels)
    if not config.whole_video:
        return resized(height, width, config.unit, config.video_pixels)
    if 0 < min(height, width) < config.unit:  # grown before its sides are rounded, as in the reference
        scale = config.unit / min(height, width)
        height, width = int(height * scale), int(width * scale)
    whole = max(1, round(frames / config.temporal_patch)) * config.temporal_patch
    return resized(height, width, config.unit, config.video_pixels, frames, whole)


def patch_times(frames: int, fps: float, depth: int) -> tuple[float, ...]:
    """The moment in the middle of each temporal patch of ``depth`` frames, in seconds; a last frame may be repeated."""
    moments = [frame / fps for frame in range(frames)]
    moments += moments[-1:] * (-frames % depth)
    return tuple((moments[i] + moments[i + depth - 1]) / 2 for i in range(0, len(moments), depth))


def patchify(frames: Float[np.ndarray, "t h w c"], config: MediaConfig) -> tuple[Float[np.ndarray, "p q"], Grid]:
    """Patches in merge-block order, values of each in the order (channel, time, row, column), and their grid.

    An odd last frame (an image is one) is repeated to fill its temporal patch.
    """
    missing = -len(frames) % config.temporal_patch
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    sides = {"t2": config.temporal_patch, "p": config.patch, "q": config.patch, "i": config.merge, "j": config.merge}
    values = rearrange(frames, "(t t2) (h i p) (w j q) c -> (t h w i j) (c t2 p q)", **sides)
    t, h, w = frames.shape[:3]
    return values, (t // config.temporal_patch, h // config.patch, w // config.patch)


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """An RGB image; what is transparent lies on white, as in the reference. Arrays must be uint8 ``[h w 3]``.

    Raises UserError for other arrays, and for images of more than 8 bits per channel.
    """
    if isinstance(image, Image.Image):
        if image.mode not in MODES:
            raise UserError(f"an image of mode {image.mode}, expected 8 bits per channel")
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    return Image.fromarray(image)


def _pixels(image: Image.Image, size: tuple[int, int], config: MediaConfig) -> np.ndarray:
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    return (np.asarray(image, np.float32) / np.float32(255) - mean) / std


def read_image(image: Image.Image | np.ndarray, config: MediaConfig) -> Patches:
    """An image as patches. Raises UserError as ``as_image`` does."""
    image = as_image(image)
    size = target_size(image.height, image.width, config)
    return Patches(*patchify(_pixels(image, size, config)[None], config))


def read_video(frames: Sequence[Image.Image | np.ndarray], fps: float, config: MediaConfig) -> Patches:
    """Frames that stand for ``fps`` per second of video, as patches (see ``sample_frames`` for choosing them).

    Raises UserError for no frames, frames of different sizes or an ``fps`` that is not positive.
    """
    if not fps > 0:
        raise UserError(f"frames per second must be positive, not {fps}")
    images = [as_image(frame) for frame in frames]
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise UserError(f"a video needs frames of one size; these have (width, height) {sorted(sizes) or 'none'}")
    size = target_size(images[0].height, images[0].width, config, frames=len(images))
    values, grid = patchify(np.stack([_pixels(image, size, config) for image in images]), config)
    times = patch_times(len(images), fps, config.temporal_patch)
    return Patches(values, grid, config.temporal_patch / fps, times)


def sample_frames(
    count: int, fps: float, *, target: float = 2.0, least: int = 4, most: int = 768, multiple: int = 2
) -> tuple[Int[np.ndarray, " t"], float]:
    """Which of ``count`` frames to read for about ``target`` a second, and the frames per second that they stand for.

    Their number is a multiple of ``multiple`` and lies in ``[least, most]`` as far as the video allows.
    Raises UserError if the video is shorter than ``multiple``.
    """
    number = min(max(count / fps * target, least), min(most, count) // multiple * multiple)
    number = int(number // multiple) * multiple
    if number < multiple:
        raise UserError(f"a video of {count} frames is too short: {multiple} are needed")
    return np.floor(np.arange(number) * (count / number)).astype(np.int64), number / count * fps
