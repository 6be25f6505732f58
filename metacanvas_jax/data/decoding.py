"""Pictures from untrusted bytes: the header is judged before any pixel is decoded, so memory and time are bounded."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from metacanvas_jax import files
from metacanvas_jax.config.sources import LIMITS, Limits
from metacanvas_jax.data.transforms import Clip, fit_image, shown_frames
from metacanvas_jax.errors import first_line
from metacanvas_jax.images import MODES, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class MediaError(ValueError):
    """Media that cannot or must not be decoded; the message says why, the caller names the record."""


def read_medium(path: str | os.PathLike, name: str, limits: Limits = LIMITS) -> bytes:
    """The bytes of a file of media. Raises MediaError, calling it ``name``, if it is missing or larger than allowed."""
    try:
        size = files.size(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MediaError(f"{name} is missing") from None
    if size > limits.bytes:
        raise MediaError(f"{name} has {size} bytes, at most {limits.bytes} are allowed")
    return files.read_range(path, 0, size)


def decode_image(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """The first frame of a picture in sRGB, upright as its EXIF data say; what is transparent lies on white.

    Raises MediaError for other formats, other depths than 8 bits, damage, or more bytes or pixels than allowed, which
    are known from the header alone.
    """
    with _reading(data, limits) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def decode_animation(data: bytes, clip: Clip, limits: Limits = LIMITS) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """The frames that a clip takes of an animated GIF or WebP, and how many of them make a second.

    Every frame is shown for the delay that the file gives it; a frame without a delay is shown for a 24th of a second.
    Without ``clip.fps`` every frame is taken once, at the mean rate.

    Raises MediaError as `decode_image` does, and for more frames than allowed or fewer than the clip needs.
    """
    with _reading(data, limits) as image:
        count = getattr(image, "n_frames", 1)
        if count > limits.frames or count * image.width * image.height > limits.decoded_pixels:
            raise MediaError(f"an animation of {count} frames of {image.height} x {image.width} pixels is too large")
        starts = [0.0]
        for number in range(count):
            image.seek(number)
            image.load()  # a WebP tells a frame's delay only then
            starts.append(starts[-1] + (image.info.get("duration", 0) / 1000 or 1 / 24))
        fps = count / starts[-1]
        chosen = shown_frames(starts, clip)
        if len(chosen) * image.width * image.height > limits.decoded_pixels:
            raise MediaError(f"{len(chosen)} frames of {image.height} x {image.width} pixels are too many")
        frames = {}
        for number in sorted(set(chosen.tolist())):
            image.seek(number)
            frames[number] = fit_image(to_rgb(image), clip.size)
        return np.stack([frames[number] for number in chosen.tolist()]), clip.fps or fps


@contextlib.contextmanager
def _reading(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """A picture of which only the header was read, and that is within the limits."""
    if len(data) > limits.bytes:
        raise MediaError(f"a picture of {len(data)} bytes, at most {limits.bytes} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise MediaError(
                    f"a picture of {image.height} x {image.width} pixels, at most {limits.pixels} in all are allowed"
                )
            if image.mode not in MODES:
                raise MediaError(f"a picture of mode {image.mode}, wanted 8 bits per channel")
            yield image
    except MediaError:
        raise
    except (
        *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise MediaError(f"no readable picture ({first_line(error)})") from error


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
