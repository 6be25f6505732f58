"""Bad data, media and archives, for the table of bad inputs."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from bad_inputs_support import case, table
from PIL import Image

from metacanvas_jax.config.sources import Limits, SourceSection
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.sources import open_source


def png(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture(side=8):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(folder, data=b"", *, row=None, prompt="a cat", limits=None):
    """The first sample of a folder of rows."""
    (folder / "a.png").write_bytes(data)
    row = json.dumps({"target": "a.png", "prompt": prompt}) if row is None else row
    (folder / "rows.jsonl").write_text(row + "\n")
    limits = Limits() if limits is None else limits
    return open_source(SourceSection("jsonl", str(folder / "rows.jsonl"), limits=limits))[0]


def tar(folder, members, cut=None):
    """The first sample of a tar of (name, bytes or target of a link)."""
    path = folder / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
                archive.addfile(entry)
            else:
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[:cut])
    return open_source(SourceSection("webdataset", str(path)))[0]


def section(folder, kind, name, data):
    (folder / name).write_bytes(data)
    return open_source(SourceSection(kind, str(folder / name)))


def batches(weight=1.0, **options):
    return pipeline([Source(range(5), weight)], PipelineConfig(8), list, **options)


table(
    {
        "data set is missing": (
            lambda f: Records(f / "none"),
            "none: no dataset there; make it with `metacanvas prepare",
        ),
        "data set with a broken recipe": (
            lambda f: (f.joinpath("recipe.json").write_text("{"), Records(f)),
            r"recipe\.json: not valid JSON .*; delete the folder and prepare again",
        ),
        "batch that does not divide": (lambda _: batches(process_count=3), "a batch of 8 does not divide over 3 hosts"),
        "sources without weight": (lambda _: batches(weight=0.0), "no data source has a weight above zero"),
        "picture of 100000 x 100000": (
            lambda f: rows(f, png(100_000, 100_000)),
            "100000 x 100000 pixels|no readable picture",
        ),
        "picture larger than allowed": (
            lambda f: rows(f, picture(64), limits=Limits(pixels=1000)),
            "64 x 64 pixels, at most 1000 in all are allowed",
        ),
        "file larger than allowed": (lambda f: rows(f, bytes(999), limits=Limits(bytes=99)), "999 bytes, at most 99"),
        "picture that is cut": (lambda f: rows(f, picture()[:100]), "no readable picture"),
        "picture that is text": (lambda f: rows(f, b"hello"), "no readable picture"),
        "picture that is a program": (lambda f: rows(f, b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage"), "no readable picture"),
        "empty caption": (lambda f: rows(f, picture(), prompt=""), "an empty caption"),
        "row that is no JSON": (lambda f: rows(f, row="{"), "not valid JSON"),
        "row that is a list": (lambda f: rows(f, row="[1]"), "a JSON list, wanted an object"),
        "row that leaves its folder": (
            lambda f: rows(f, row='{"target": "../x.png", "prompt": "x"}'),
            "points outside",
        ),
        "row with an absolute path": (
            lambda f: rows(f, row='{"target": "/etc/passwd", "prompt": "x"}'),
            "points outside",
        ),
        "archive that leaves its folder": (
            lambda f: tar(f, [("../../x.png", picture()), ("../../x.txt", b"x")]),
            "points outside the archive",
        ),
        "archive with a link": (lambda f: tar(f, [("x.png", "/etc/passwd"), ("x.txt", b"x")]), "is a link or device"),
        "archive that is cut": (lambda f: tar(f, [("x.png", bytes(2000))], cut=1000), "the shard is truncated"),
        "archive that is compressed": (
            lambda f: section(f, "webdataset", "a.tar", b"\x1f\x8b" + bytes(600)),
            "no uncompressed tar .*; unpack .tar.gz",
        ),
        "table that is none": (lambda f: section(f, "parquet", "a.parquet", b"PAR1 or so"), "no readable parquet file"),
    }
)


def video(claim):
    """An MP4 of two frames whose table claims another number."""
    from metacanvas_jax.data.video import encode_mp4

    data = encode_mp4(np.zeros((2, 32, 32, 3), np.uint8), 24)
    at = data.index(b"stsz") + 4
    return data[:at] + struct.pack(">III", 0, 1, claim) + data[at + 12 :]


@case(r"corrupt \(.*(10\*\*9|1000000000|frames)")
def video_that_claims_a_thousand_million_frames(folder):
    pytest.importorskip("av")
    (folder / "a.mp4").write_bytes(video(10**9))
    (folder / "a.txt").write_text("a cat")
    open_source(SourceSection("files", str(folder), task="text_to_video"))[0]
