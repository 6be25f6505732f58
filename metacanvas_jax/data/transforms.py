"""Pixels of any size and rate brought to the static shape of a batch. On the host, numpy and Pillow."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

LEAST_FPS, MOST_FPS = 0.01, 1000.0  # frames per second that are believed; others would make clips without end
MOST_FRAMES = 1 << 20  # of one clip


@dataclasses.dataclass(frozen=True)
class Clip:
    """The shape that media are read in; None leaves a part as it is found.

    ``size`` is (rows, columns) in pixels. ``frames`` are taken ``fps`` a second from the beginning (None: every frame).
    Without ``frames`` a video keeps the most frames of the form 4k + 1 that it has, which is what a causal video
    autoencoder encodes. Raises ValueError for impossible numbers.
    """

    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"a size must be positive, not {self.size}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, not {self.frames}")
        if self.fps is not None and not LEAST_FPS <= self.fps <= MOST_FPS:
            raise ValueError(f"fps must lie in [{LEAST_FPS}, {MOST_FPS}], not {self.fps}")


AS_FOUND = Clip()


def fit_image(image: Image.Image, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    """An RGB image scaled until it covers ``size`` and cropped about its centre; untouched where it has that size."""
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return np.asarray(image)


def fit_frames(frames: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int] | None) -> UInt8[np.ndarray, "t h w 3"]:
    """``fit_image`` for every frame."""
    if size is None or frames.shape[1:3] == tuple(size):
        return frames
    return np.stack([fit_image(Image.fromarray(frame), size) for frame in frames])


def causal_frames(count: int) -> int:
    """The most frames of the form 4k + 1 among ``count``; 0 for none."""
    return 0 if count < 1 else (count - 1) // 4 * 4 + 1


def shown_frames(starts: Sequence[float], clip: Clip) -> Int[np.ndarray, " t"]:
    """Which frames of an animation a clip takes, by the moments in seconds at which they begin; the last is the end.

    Without ``clip.fps`` every frame is taken once. Raises ValueError where the animation is too short for the clip.
    """
    if clip.fps is None:
        return frame_indices(len(starts) - 1, None, clip)
    moments = frame_indices(1 + math.floor(starts[-2] * clip.fps + 1e-6), clip.fps, clip) / clip.fps
    return np.searchsorted(np.asarray(starts[1:-1]), moments + 1e-6, side="right").astype(np.int64)


def frame_indices(count: int, fps: float | None, clip: Clip) -> Int[np.ndarray, " t"]:
    """Which of ``count`` frames at ``fps`` a clip takes: for every moment of the clip, the frame shown then.

    Raises ValueError where the video is too short for the clip.
    """
    ratio = 1.0 if clip.fps is None or fps is None else fps / clip.fps
    available = 0 if count < 1 else math.floor((count - 1) / ratio + 1e-6) + 1
    wanted = causal_frames(available) if clip.frames is None else clip.frames
    if wanted > MOST_FRAMES:
        raise ValueError(f"a clip of {wanted} frames, at most {MOST_FRAMES} are allowed")
    if wanted > available or wanted < 1:
        rate = "" if clip.fps is None else f" at {clip.fps:g} per second"
        raise ValueError(f"{available} frames{rate}, {max(wanted, 1)} are wanted")
    return np.floor(np.arange(wanted) * ratio + 1e-6).astype(np.int64)
