"""Pictures from untrusted bytes: the header is judged before any pixel is decoded, so memory and time are bounded."""

import dataclasses
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class MediaError(ValueError):
    """Media that cannot or must not be decoded; the message says why, the caller names the record."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one medium may hold: encoded bytes, pixels of a frame, frames, and pixels of all frames read."""

    bytes: int = 1 << 30
    pixels: int = 1 << 26
    frames: int = 1 << 16
    decoded_pixels: int = 1 << 30


LIMITS = Limits()


def decode_image(data: bytes, limits: Limits = LIMITS) -> UInt8[np.ndarray, "h w 3"]:
    """The first frame of a picture in RGB; what is transparent lies on white.

    Raises MediaError for other formats, damage, or more bytes or pixels than allowed (known from the header alone).
    """
    if len(data) > limits.bytes:
        raise MediaError(f"a picture of {len(data)} bytes, at most {limits.bytes} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise MediaError(
                    f"a picture of {image.height} x {image.width} pixels, at most {limits.pixels} in all are allowed"
                )
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"no readable picture ({first_line(error)})") from error


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of a log."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]
