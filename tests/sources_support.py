"""Small data sets of every layout, and media that mean harm."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.transforms import Clip

SIZE = (12, 16)


def picture(number, size=SIZE):
    """A picture that knows its number."""
    return np.full((*size, 3), number, np.uint8)


def encoded(number, kind="PNG", size=SIZE):
    buffer = io.BytesIO()
    Image.fromarray(picture(number, size)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members):
    """``members`` are (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def pairs(count, start=0):
    """Members in BLIP3o's layout."""
    members = []
    for number in range(start, start + count):
        members += [(f"{number:06d}.png", encoded(number)), (f"{number:06d}.txt", f"caption {number}".encode())]
    return members


def write_rows(folder, rows):
    """A JSONL folder: ``rows`` are dicts, or raw lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb(side):
    """A PNG of a few kilobytes that decodes to a huge black picture."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def clip(count, size=(32, 48), fps=24):
    """An MP4 whose frames grow brighter by 8 each."""
    from metacanvas_jax.data.video import encode_mp4

    frames = np.stack([picture(8 * number, size) for number in range(count)])
    return encode_mp4(frames, fps)


def claiming(video, frames):
    """An MP4 with its table of sample sizes rewritten: equal sizes, and as many samples as it is told."""
    at = video.index(b"stsz") + 4
    return video[:at] + struct.pack(">III", 0, 1, frames) + video[at + 12 :]


def gif(count, size=SIZE, milliseconds=100):
    pictures = [Image.fromarray(picture(20 * number, size)) for number in range(count)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds)
    return buffer.getvalue()


def opened(kind, path, clip=Clip(), **options):  # noqa: B008
    return open_source(SourceSection(kind=kind, path=str(path), **options), clip)
