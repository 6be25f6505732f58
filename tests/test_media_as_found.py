"""Pictures, videos, captions and archives as people really have them: read right, or one bad record that says why."""

import io
import json
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageCms

from metacanvas_jax.config.sources import Limits, SourceSection
from metacanvas_jax.data.decoding import MediaError, decode_animation, decode_image
from metacanvas_jax.data.formats.tars import load_index, make_index
from metacanvas_jax.data.layout import Layout, place_of
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour=RED, size=(8, 6), kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def tar_source(path, task="text_to_image", **options):
    return open_source(SourceSection("webdataset", str(path), task, cache=str(path.parent / "cache"), **options))


# ---- Pictures ----


def wide_gamut_profile() -> bytes:
    """An RGB profile with exchanged red and blue primaries, so that applying it cannot be mistaken for ignoring it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace(b"s\0R\0G\0B", b"s\0W\0A\0P").replace(b"\0s\0R\0G\0B", b"\0s\0W\0A\0P")


def test_an_icc_profile_is_applied():
    pixel = decode_image(picture((200, 0, 0), icc_profile=wide_gamut_profile())).getpixel((3, 3))
    assert pixel[2] > 150 and pixel[0] < 60


def test_a_profile_of_srgb_leaves_every_pixel_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(decode_image(buffer.getvalue())), noise)


def test_a_damaged_profile_is_ignored():
    assert decode_image(picture((9, 90, 200), icc_profile=b"no profile")).getpixel((0, 0)) == (9, 90, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({"transparency": image.getpixel((0, 0))} if mode == "P" else {}))
    assert decode_image(buffer.getvalue()).getpixel((1, 1)) == (255, 255, 255)


def animation(kind="GIF", count=5) -> bytes:
    """Frames of growing brightness; the first is shown for 0.4 s, the others for 0.1 s."""
    frames = [Image.new("RGB", (4, 4), (20 * i, 20 * i, 20 * i)) for i in range(count)]
    options = {"duration": [400, *[100] * (count - 1)], "loop": 0} | ({"lossless": True} if kind == "WEBP" else {})
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_delays_of_an_animation_are_kept(kind):
    video, fps = decode_animation(animation(kind), Clip(frames=5, fps=10.0))
    assert fps == 10.0
    assert video[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 20]


@pytest.mark.parametrize("limits", [Limits(frames=4), Limits(decoded_pixels=5 * 16 - 1)])
def test_an_animation_beyond_the_limits_is_refused_before_it_is_decoded(limits, monkeypatch):
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "load", lambda _: pytest.fail("a frame was decoded"))
    with pytest.raises(MediaError, match="an animation of 5 frames of 4 x 4 pixels is too large"):
        decode_animation(animation(), Clip(), limits)


# ---- Names of files ----


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a/b.v2.final.PNG", ("a/b.v2.final", "png")),
        ("0001.source.png", ("0001", "source")),
        ("0001.edited_img.webp", ("0001", "edited_img")),
        ("0001.reference2.jpg", ("0001", "references.0002")),
        ("0001.references_11.jpg", ("0001", "references.0011")),
        ("._0001.jpg", None),
        (".hidden", None),
        ("README", None),
    ],
)
def test_place_of_a_file(file, place):
    assert place_of(file) == place


def test_images_of_one_sample_are_parts_of_it(tmp_path):
    members = {"0.target.png": picture(BLUE), "0.source.png": picture(RED), "0.txt": b"make it blue"}
    write_tar(tmp_path / "edits.tar", members)
    sample = tar_source(tmp_path / "edits.tar", "image_editing")[0]
    assert sample.source[0, 0, 0].tolist() == list(RED) and sample.target[0, 0, 0].tolist() == list(BLUE)


def test_names_with_dots_are_different_samples(tmp_path):
    members = {f"img.{i}.png": picture() for i in range(2)} | {f"img.{i}.txt": b"a picture" for i in range(2)}
    write_tar(tmp_path / "dots.tar", members)
    assert len(tar_source(tmp_path / "dots.tar")) == 2


def test_two_pictures_of_one_name_are_one_bad_record(tmp_path):
    for kind in ("png", "jpg"):
        (tmp_path / f"0001.{kind}").write_bytes(picture(kind="PNG" if kind == "png" else "JPEG"))
    (tmp_path / "0001.txt").write_text("a picture")
    (tmp_path / "._0001.jpg").write_bytes(b"from a Mac")
    source = open_source(SourceSection("files", str(tmp_path)))
    assert len(source) == 1
    with pytest.raises(UserError, match=r"0001 is corrupt .*jpg and png of one name"):
        source[0]


@pytest.mark.parametrize("extension", ["jpg", "bmp", "webp", "gif"])
def test_every_documented_picture_is_read(extension, tmp_path):
    kind = {"jpg": "JPEG"}.get(extension, extension.upper())
    (tmp_path / f"x.{extension}").write_bytes(picture(kind=kind))
    (tmp_path / "x.txt").write_text("a picture")
    assert open_source(SourceSection("files", str(tmp_path)))[0].target.shape == (1, 6, 8, 3)


def test_paths_may_hold_what_means_something_to_glob(tmp_path):
    folder = tmp_path / "set [v1] {a,b}"
    folder.mkdir()
    write_tar(folder / "x[0].tar", {"0.png": picture(), "0.txt": b"a picture"})
    assert len(tar_source(folder)) == len(tar_source(folder / "x[0].tar")) == 1


# ---- Captions and sidecars ----


@pytest.mark.parametrize(
    "sidecar",
    [
        {"caption": "space", "source": "laion2b"},
        {"caption": "space", "image": "000.jpg"},
        {"caption": "space", "references": 7, "fps": "many", "video": None},
    ],
)
def test_what_a_task_does_not_need_may_be_anything(sidecar, tmp_path):
    write_tar(tmp_path / "x.tar", {"000.jpg": picture(kind="JPEG"), "000.json": json.dumps(sidecar).encode()})
    assert tar_source(tmp_path / "x.tar")[0].prompt == "space"
    (tmp_path / "000.jpg").write_bytes(picture(kind="JPEG"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(sidecar | {"target": "000.jpg"}))
    assert open_source(SourceSection("jsonl", str(tmp_path / "rows.jsonl")))[0].prompt == "space"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_bytes("\ufeffa red cat".encode())
    assert open_source(SourceSection("files", str(tmp_path)))[0].prompt == "a red cat"


def test_half_a_surrogate_pair_is_a_bad_record():
    with pytest.raises(MediaError, match="half a surrogate pair"):
        Layout().sample({"png": picture(), "json": b'{"caption": "\\ud83d"}'})


def test_too_many_references_are_a_bad_record():
    row = {"png": picture(), "txt": b"x", "references": [picture()] * 65}
    with pytest.raises(MediaError, match="65 references, at most 64"):
        Layout("reference_to_video").sample(row)


# ---- Archives ----


def test_a_second_archive_is_not_lost_in_silence(tmp_path):
    first = write_tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": b"a"})
    second = write_tar(tmp_path / "b.tar", {"1.png": picture(), "1.txt": b"b"})
    (tmp_path / "joined.tar").write_bytes(first + second)
    found = make_index(tmp_path / "joined.tar")
    assert next(members["!"] for members in found.values() if "!" in members).startswith("data follow the end mark")


def test_a_damaged_header_is_not_lost_in_silence(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {f"{i}.txt": b"x" for i in range(4)}))
    data[2048 : 2048 + 100] = b"\xff" * 100  # the header of the third member
    (tmp_path / "a.tar").write_bytes(data)
    found = make_index(tmp_path / "a.tar")
    assert any("!" in members for members in found.values())


def resealed(header: bytes) -> bytes:
    """A header of a member with the checksum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:512]


@pytest.mark.parametrize("size", [b"-0000000001\0", b"77777777777\0"])
def test_impossible_sizes_are_damage(size, tmp_path):
    data = write_tar(tmp_path / "a.tar", {"0.txt": b"x", "1.txt": b"x"})
    (tmp_path / "a.tar").write_bytes(resealed(data[:124] + size + data[136:512]) + data[512:])
    assert any("!" in members for members in make_index(tmp_path / "a.tar").values())


def test_a_sparse_member_is_a_bad_record(tmp_path):
    data = write_tar(tmp_path / "a.tar", {"0.txt": b"x", "1.txt": b"x"})
    (tmp_path / "a.tar").write_bytes(resealed(data[:156] + b"S" + data[157:512]) + data[512:])
    found = make_index(tmp_path / "a.tar")
    assert found["0"] == {"!": "0.txt is a sparse file"} and set(found["1"]) == {"txt"}


def test_thousands_of_extended_headers_are_damage(tmp_path):
    """Python's reader calls itself for each of them."""
    data = write_tar(tmp_path / "a.tar", {"0.txt": b"x", "1.txt": b"x"})
    record = b"11 abc=def\n"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    extended = (header.tobuf() + record.ljust(512, b"\0")) * 2000
    (tmp_path / "a.tar").write_bytes(data[:1024] + extended + data[1024:])
    found = make_index(tmp_path / "a.tar")
    assert set(found["0"]) == {"txt"}
    assert any(members.get("!", "").startswith("the shard is damaged after byte") for members in found.values())


def test_names_that_are_not_utf8_are_read(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"caf_.png": picture(), "caf_.txt": b"a"}))
    for at in (0, data.index(b"caf_.txt")):
        data[at + 3] = 0xE9
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "a.tar").write_bytes(data)
    assert tar_source(tmp_path / "a.tar")[0].name == "a.tar/café"


@pytest.mark.parametrize("text", ["[]", "null", '{"stamp": %s}', '{"stamp": %s, "entries": {"0": {"png": [-1, 5]}}}'])
def test_a_damaged_index_is_made_again(text, tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"0.png": picture(), "0.txt": b"a"})
    right = load_index(path)
    index = path.with_name("a.tar.index.json")
    stamp = json.dumps(json.loads(index.read_text())["stamp"])
    index.write_text(text % stamp if "%s" in text else text)
    assert {key: set(members) for key, members in load_index(path).items()} == {
        key: set(members) for key, members in right.items()
    }
    assert json.loads(index.read_text())["entries"].keys() == right.keys()


# ---- Videos ----


def clip(rotation: int = 0, aspect: str = "1:1", size=(64, 96)) -> bytes:
    """Four seconds at one frame each: the left half red, the right half blue, as a camera stores them."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska" if aspect != "1:1" else "mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect.replace(":", "/"))
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[:, : size[1] // 2], pixels[:, size[1] // 2 :] = RED, BLUE
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(buffer.getvalue())
    if rotation:
        at = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix
        turns = {90: (0, 1, -1, 0), 270: (0, -1, 1, 0), 180: (-1, 0, 0, -1)}[rotation]
        a, b, c, d = (turn * 65536 for turn in turns)
        data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return bytes(data)


DOCUMENTED = {"mp4": ("mp4", "libx264"), "mov": ("mov", "libx264"), "mkv": ("matroska", "libx264")}
DOCUMENTED["webm"] = ("webm", "libvpx-vp9")


@pytest.mark.parametrize("extension", DOCUMENTED)
def test_every_documented_video_is_read(extension, tmp_path):
    av = pytest.importorskip("av")
    container_format, codec = DOCUMENTED[extension]
    with av.open(str(tmp_path / f"x.{extension}"), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=4)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    (tmp_path / "x.txt").write_text("a video")
    sample = open_source(SourceSection("files", str(tmp_path), "text_to_video"))[0]
    assert sample.target.shape == (5, 32, 48, 3) and sample.fps == 4


def test_a_pause_of_hours_is_a_bad_record():
    """Else the frame before it would be repeated for every moment of the pause."""
    av = pytest.importorskip("av")
    from metacanvas_jax.data.video import decode_video

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for second in (0, 1, 100_000):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = second, Fraction(1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="a pause of 99999 s between two frames"):
        decode_video(buffer.getvalue(), Clip(frames=9, fps=1.0))


def test_pixels_that_are_made_square_stay_within_the_limits():
    """A file may say that its pixels are ten thousand times as wide as high."""
    from metacanvas_jax.data.video import decode_video

    with pytest.raises(MediaError, match="frames of 64 x 192 pixels, at most 6144 in all are allowed"):
        decode_video(clip(aspect="2:1"), limits=Limits(pixels=64 * 96))


def test_a_turned_video_comes_out_upright():
    from metacanvas_jax.data.video import decode_video

    video, _ = decode_video(clip(rotation=90))  # the camera was held upright: what it stored on the left is on top
    assert video.shape[1:3] == (96, 64)
    assert video[0, 10, 32].argmax() == 0 and video[0, -10, 32].argmax() == 2


def test_pixels_that_are_not_square_are_made_square():
    from metacanvas_jax.data.video import decode_video

    video, _ = decode_video(clip(aspect="2:1"))
    assert video.shape[1:3] == (64, 192)


@pytest.mark.parametrize("fps", [24.0, 29.97, 12.5, 0.4])
def test_a_written_video_has_the_rate_and_the_colours_that_were_given(fps):
    av = pytest.importorskip("av")
    from metacanvas_jax.data.video import decode_video, encode_mp4

    data = encode_mp4(np.full((5, 64, 64, 3), (200, 60, 60), np.uint8), fps)
    with av.open(io.BytesIO(data)) as opened:
        stream = opened.streams.video[0]
        context = stream.codec_context
        assert float(stream.average_rate) == pytest.approx(fps, rel=5e-4)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    video, _ = decode_video(data)
    assert np.abs(video.astype(int) - (200, 60, 60)).max() <= 4
