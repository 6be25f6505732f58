"""Pictures for reports: converted to bytes, enlarged, framed, put on a sheet with captions, written as PNG or GIF."""

import base64
import io
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from metacanvas_jax import files

Picture = UInt8[np.ndarray, "h w 3"]

RIGHT, WRONG = (26, 150, 80), (200, 50, 60)
_PAPER, _INK = (255, 255, 255), (40, 44, 52)
_GAP, _FONT_SIZE = 8, 12


def to_uint8(pixels: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Pixels in [-1, 1] to bytes, rounded; what lies outside is clipped. Raises ValueError for values not finite."""
    pixels = np.asarray(pixels, np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("a picture has pixels that are not finite")
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def upscale(picture: Picture, least: int) -> Picture:
    """Repeats pixels by the smallest whole factor that makes both sides at least ``least`` long."""
    factor = max(1, -(-least // min(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def frame(picture: Picture, colour: tuple[int, int, int], width: int = 2) -> Picture:
    """The picture inside a border of ``width`` pixels; it grows by the border."""
    height, breadth = picture.shape[:2]
    out = np.empty((height + 2 * width, breadth + 2 * width, 3), np.uint8)
    out[:] = colour
    out[width : width + height, width : width + breadth] = picture
    return out


Box = tuple[tuple[float, float, float, float], tuple[int, int, int]]
"""Left, top, right and bottom in pixels of a picture, and the colour of the line."""


def boxed(picture: Picture, boxes: Sequence[Box], least: int = 180) -> Picture:
    """The picture, enlarged, with boxes on it."""
    large = upscale(picture, least)
    factor = large.shape[0] // picture.shape[0]
    image = Image.fromarray(large)
    pen = ImageDraw.Draw(image)
    for (left, top, right, bottom), colour in boxes:
        corners = (left * factor, top * factor, right * factor - 1, bottom * factor - 1)
        pen.rectangle(corners, outline=colour, width=max(1, factor // 2))
    return np.asarray(image)


def grid(
    pictures: Sequence[Picture],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    *,
    right: Sequence[bool | None] | None = None,
    headings: Sequence[tuple[str, int]] = (),
    least: int = 128,
) -> Picture:
    """A white sheet of pictures of equal size, row by row, small ones enlarged to ``least``, captions below.

    ``right`` frames each picture in green or red (None: no verdict, no frame). ``headings`` name the parts of a picture
    from left to right, each with its width in pixels, and stand above the first row. Raises ValueError when there are
    no pictures, when sizes differ, or when captions or verdicts are not one per picture.
    """
    if not pictures or columns < 1:
        raise ValueError(f"a sheet needs at least one picture and one column; got {len(pictures)} and {columns}")
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"pictures of one sheet differ in size: {sorted({p.shape for p in pictures})}")
    for name, given in (("captions", captions), ("verdicts", right)):
        if given is not None and len(given) != len(pictures):
            raise ValueError(f"{len(given)} {name} for {len(pictures)} pictures")

    verdicts = right if right is not None else [None] * len(pictures)
    colours = [_PAPER if verdict is None else (RIGHT if verdict else WRONG) for verdict in verdicts]
    tiles = [frame(upscale(p, least), colour, 3) for p, colour in zip(pictures, colours, strict=True)]
    height, width = tiles[0].shape[:2]
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrapped(caption, font, width) for caption in captions] if captions is not None else [""] * len(tiles)
    line = _FONT_SIZE + 4
    above = line if headings else 0
    below = line * max(text.count("\n") + 1 for text in texts) if captions is not None else 0

    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + below + _GAP) + _GAP + above), _PAPER)
    pen = ImageDraw.Draw(sheet)
    scale = (width - 6) / pictures[0].shape[1]
    for column in range(columns if headings else 0):
        x = column * (width + _GAP) + _GAP + 3.0
        for name, breadth in headings:
            pen.text((x, _GAP), name, fill=_INK, font=font)
            x += scale * breadth
    for i, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x = _GAP + (i % columns) * (width + _GAP)
        y = above + _GAP + (i // columns) * (height + below + _GAP)
        sheet.paste(Image.fromarray(tile), (x, y))
        pen.multiline_text((x + 3, y + height + 1), text, fill=_INK, font=font, spacing=2)
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    letters = max(4, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(text, letters)) or " "


def data_uri(picture: Picture) -> str:
    """A picture inside a page, as the source of an ``<img>``."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


def png(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def gif(frames: Sequence[Picture], fps: float) -> bytes:
    """Frames of equal size as an animated GIF that repeats; a GIF counts time in hundredths of a second."""
    buffer = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames)
    duration = max(10, round(100 / fps) * 10)
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return buffer.getvalue()


def save_png(picture: Picture, path: str | os.PathLike) -> None:
    """Writes a PNG, complete or not at all. Raises UserError when it cannot."""
    files.write(files.folder(path), png(picture))
