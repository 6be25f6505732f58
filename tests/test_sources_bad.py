"""Sources with records that are bad or mean harm: counted, named and passed over up to a limit, before work is done."""

import io
import json
import logging
import struct

import numpy as np
import pytest
from PIL import Image
from sources_support import (
    bomb,
    claiming,
    clip,
    encoded,
    gif,
    opened,
    pairs,
    png_header,
    write_tar,
)

from metacanvas_jax.config.sources import Limits
from metacanvas_jax.data import video
from metacanvas_jax.data.decoding import MediaError
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError

EDIT = {"task": "image_editing"}


VIDEO = {"task": "text_to_video"}


ROWS = {
    "corrupt image": ({"target": "corrupt.png", "prompt": "x"}, {}, "no readable picture"),
    "truncated image": ({"target": "short.png", "prompt": "x"}, {}, "no readable picture"),
    "empty caption": ({"target": "good.png", "prompt": " "}, {}, "an empty caption"),
    "no caption": ({"target": "good.png"}, {}, "missing key 'prompt' for the prompt; there are __key__, target"),
    "no picture": ({"prompt": "x"}, {}, "missing key 'target'"),
    "picture is missing": ({"target": "nowhere.png", "prompt": "x"}, {}, r"nowhere\.png is missing"),
    "caption is a number": ({"target": "good.png", "prompt": 5}, {}, "the prompt is of type int, expected text"),
    "picture is a number": ({"target": 5, "prompt": "x"}, {}, "wanted the bytes of a picture or video, found int"),
    "fps is text": ({"target": "good.png", "prompt": "x", "fps": "fast"}, VIDEO, "fps is 'fast', expected a number"),
    "fps is nearly zero": ({"target": "good.png", "prompt": "x", "fps": 1e-9}, VIDEO, "fps is 1e-09, expected a numb"),
    "fps is infinite": ({"target": "good.png", "prompt": "x", "fps": 1e300}, VIDEO, "fps is 1e.300, expected a number"),
    "not JSON": ("{", {}, "not valid JSON"),
    "JSON nested too deep": ("[" * 100_000, {}, "not valid JSON"),
    "not an object": ("[1]", {}, "a JSON list, wanted an object"),
    "sixteen bits": ({"target": "deep.png", "prompt": "x"}, {}, "mode I;16, wanted 8 bits per channel"),
    "escaping path": ({"target": "../outside.png", "prompt": "x"}, {}, "points outside"),
    "absolute path": ({"target": "/etc/passwd", "prompt": "x"}, {}, "points outside"),
    "escaping link": ({"target": "link.png", "prompt": "x"}, {}, r"link\.png points outside"),
    "no source": ({"target": "good.png", "prompt": "x"}, EDIT, "missing key 'source'"),
    "zero frames": ({"target": [], "prompt": "x"}, VIDEO, "0 frames"),
    "one frame": ({"target": ["good.png"], "prompt": "x"}, VIDEO, "one frame, text_to_video needs a video"),
    "frames of two sizes": (
        {"target": ["good.png"] * 4 + ["deep.gif"], "prompt": "x"},
        {},
        "the frames change their size",
    ),
    "huge header": ({"target": "header.png", "prompt": "x"}, {}, r"Image size \(10000000000 pixels\) exceeds limit"),
    "bomb": ({"target": "bomb.png", "prompt": "x"}, {}, "9000 x 9000 pixels, at most 1048576 in all"),
    "many bytes": ({"target": "large.png", "prompt": "x"}, {}, r"large\.png has \d+ bytes, at most 4096 are allowed"),
    "PostScript": ({"target": "code.eps", "prompt": "x"}, {}, "no readable picture"),
}


LIMITS = Limits(bytes=4096, pixels=1 << 20, frames=64, decoded_pixels=1 << 20)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "set"
    folder.mkdir()
    good = encoded(1)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(deep, "PNG")
    files = {
        "good.png": good,
        "corrupt.png": good[:40] + b"\0" * 20 + good[60:],
        "short.png": good[: len(good) // 2],
        "deep.png": deep.getvalue(),
        "deep.gif": gif(1, (5, 7)),
        "header.png": png_header(100_000, 100_000),
        "bomb.png": bomb(9_000),
        "large.png": encoded(3) + b"\0" * 5000,
        "code.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    assert len(files["bomb.png"]) > 4096  # its bytes alone would be refused: the limit of bytes is lifted for it
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder.parent / "outside.png").write_bytes(good)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


@pytest.mark.parametrize("case", ROWS)
def test_source_with_a_bad_row_stops_with_its_name_or_passes_it_over(case, hostile, caplog):
    row, options, reason = ROWS[case]
    good = {"target": "good.png", "source": "good.png", "prompt": "fine"}
    if options is VIDEO:
        good["target"] = ["good.png", "good.png", "good.png", "good.png", "good.png"]
    path = hostile / f"{list(ROWS).index(case)}.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in (good, row, good)))
    limits = Limits(bytes=1 << 20, pixels=1 << 20) if case == "bomb" else LIMITS
    with pytest.raises(UserError, match=rf"row 2 is corrupt \(.*({reason}).*\); 1 corrupt so far, 0 allowed"):
        opened("jsonl", path, limits=limits, **options)[1]
    lenient = opened("jsonl", path, limits=limits, max_skips=1, **options)
    with caplog.at_level(logging.WARNING):
        assert lenient[1].name.endswith(":3")
    assert lenient.skipped == 1 and "row 2 is corrupt" in caplog.text
    assert lenient[1].prompt == "fine" and len(caplog.records) == 1  # once, however often it is drawn


def test_source_of_a_truncated_tar_counts_its_end_as_a_bad_record(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", pairs(4)).read_bytes()
    cut = whole.index(b"000003.png") + 550  # inside the last picture
    (tmp_path / "cut.tar").write_bytes(whole[:cut])
    source = opened("webdataset", tmp_path / "cut.tar", max_skips=2)
    assert [source[i].prompt for i in range(3)] == [f"caption {i}" for i in range(3)]
    assert source[3].prompt == "caption 0" and source.skipped in (1, 2)
    with pytest.raises(UserError, match=r"cut\.tar/000003 is corrupt \(the shard is truncated inside 000003\.png\)"):
        opened("webdataset", tmp_path / "cut.tar")[3]
    (tmp_path / "header.tar").write_bytes(whole[: whole.index(b"000003.png") + 100])
    with pytest.raises(UserError, match="the shard is truncated"):
        opened("webdataset", tmp_path / "header.tar")[3]


def test_source_of_tars_refuses_members_that_escape_link_or_repeat(tmp_path):
    import tarfile

    path = write_tar(tmp_path / "a.tar", [("../../x.png", encoded(1)), ("../../x.txt", b"x"), *pairs(1), *pairs(1)])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for index, reason in enumerate(("points outside the archive", "two members", "is a link")):
        with pytest.raises(UserError, match=reason):
            opened("webdataset", path)[index]
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=r"z\.tar: no uncompressed tar"):
        opened("webdataset", tmp_path / "z.tar")


@pytest.mark.parametrize("threads", [0, 2])
def test_source_with_only_bad_records_stops_in_the_pipeline(tmp_path, threads):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(6)])
    counted = "4" if threads == 0 else "[456]"  # other threads go on reading ahead until the pipeline stops
    for skips, message in ((3, f"{counted} corrupt so far, 3 allowed"), (10, "no readable record")):
        source = opened("webdataset", tmp_path, max_skips=skips)
        batches = iter(pipeline([Source(source)], PipelineConfig(2, threads=threads), list))
        with pytest.raises(UserError, match=message):
            next(batches)


def test_source_video_that_claims_a_thousand_million_frames_is_refused_before_it_is_opened(monkeypatch):
    pytest.importorskip("av")
    harmful = claiming(clip(5), 10**9)
    opened = []
    monkeypatch.setattr(video, "_av", lambda: opened.append(1))
    with pytest.raises(MediaError, match="an MP4 that claims 1000000000 frames"):
        video.decode_video(harmful)
    fragment = struct.pack(">I4sI4sI4sII", 36, b"moof", 28, b"traf", 20, b"trun", 0, 2 * 10**9) + bytes(4)
    with pytest.raises(MediaError, match="claims 2000000000 frames"):
        video.decode_video(clip_header() + fragment)
    with pytest.raises(MediaError, match="damaged boxes"):
        video.decode_video(clip_header() + struct.pack(">I4s", 3, b"moov"))
    assert not opened


def clip_header():
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0)


def test_source_video_limits_are_kept_while_decoding():
    pytest.importorskip("av")
    data = clip(13)
    for limits, message in (
        (Limits(pixels=1000), "frames of 32 x 48 pixels, at most 1000"),
        (Limits(frames=4), "more than 4 frames"),
        (Limits(decoded_pixels=4000), "pixels in 3 frames, at most 4000"),
        (Limits(bytes=100), r"a video of \d+ bytes"),
    ):
        with pytest.raises(MediaError, match=message):
            video.decode_video(data, limits=limits)
    for broken, message in (
        (data[: len(data) // 3], "no readable video|a video of .* frames|without frames"),
        (clip_header() + bytes(300), "no readable video|damaged boxes|no video stream"),
        (b"\x1a\x45\xdf\xa3" + bytes(300), "no readable video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no MP4 or WebM video"),
        (b"", "no MP4 or WebM video"),
    ):
        with pytest.raises(MediaError, match=message):
            video.decode_video(broken)
    with pytest.raises(MediaError, match="13 frames at 24 per second, 17 are wanted"):
        video.decode_video(data, Clip(frames=17))
