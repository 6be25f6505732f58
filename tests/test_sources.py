"""Every layout of data: what is read, what is refused, and that nothing harmful is decoded."""

import io
import json
import logging
import pathlib
import pickle
import struct
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from sources_support import bomb, claiming, clip, encoded, gif, pairs, picture, png_header, write_rows, write_tar

from metacanvas_jax.config.sources import Kind, Limits, SourceSection
from metacanvas_jax.data import decoding, video
from metacanvas_jax.data.decoding import MediaError
from metacanvas_jax.data.formats import tars
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.sources import OPENERS, open_source
from metacanvas_jax.data.transforms import Clip, causal_frames, frame_indices
from metacanvas_jax.errors import UserError


def _open(kind, path, clip=Clip(), **options):  # noqa: B008
    return open_source(SourceSection(kind=kind, path=str(path), **options), clip)


# ---- Layouts ----


def test_source_of_tars_reads_pairs_at_random_through_an_index_made_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", pairs(3))
    write_tar(tmp_path / "b.tar", pairs(2, start=3))
    source = _open("webdataset", tmp_path)
    assert len(source) == 5
    for number in (4, 0, 3):
        sample = source[number]
        assert sample.prompt == f"caption {number}" and sample.task == "text_to_image"
        np.testing.assert_array_equal(sample.target, picture(number)[None])
        assert sample.name == f"{'ab'[number > 2]}.tar/{number:06d}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.tar{s}" for n in "ab" for s in ("", ".index.json")}

    def made_again(path):
        raise AssertionError(path)

    monkeypatch.setattr(tars, "make_index", made_again)
    assert len(_open("webdataset", tmp_path / "*.tar")) == 5
    monkeypatch.undo()
    write_tar(tmp_path / "a.tar", pairs(1))  # another file under the name
    assert len(_open("webdataset", tmp_path / "a.tar")) == 1
    assert len(_open("webdataset", tmp_path / "b.tar", cache=str(tmp_path / "cache"))) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_source_of_tars_reads_captions_inside_json(tmp_path):
    data = json.dumps({"caption": "a cat", "size": [1, 2]}).encode()
    write_tar(tmp_path / "a.tar", [("x.json", data), ("x.jpg", encoded(9, "JPEG"))])
    assert _open("webdataset", tmp_path)[0].prompt == "a cat"
    columns = (("prompt", "json.caption"), ("target", "jpg"))
    assert _open("webdataset", tmp_path, columns=columns)[0].prompt == "a cat"
    with pytest.raises(UserError, match=r"a\.tar/x is corrupt \(missing key 'json\.text' for the prompt; there are"):
        _open("webdataset", tmp_path, columns=(("prompt", "json.text"),))[0]


def test_source_of_rows_reads_edits_references_and_frames(tmp_path):
    folder = write_rows(
        tmp_path / "set",
        [
            {"prompt": "make it blue", "target": "after.png", "source": "sub/before.png"},
            {"prompt": "the cat runs", "target": ["0.png", "1.png"], "references": ["0.png"], "fps": 8},
        ],
    )
    (folder / "sub").mkdir()
    for name, number in (("after", 5), ("sub/before", 6), ("0", 0), ("1", 1)):
        (folder / f"{name}.png").write_bytes(encoded(number))
    edit = _open("jsonl", folder, task="image_editing")[0]
    assert (edit.prompt, edit.image[0, 0, 0], edit.source[0, 0, 0, 0]) == ("make it blue", 5, 6)
    shown = _open("jsonl", folder / "metadata.jsonl", Clip(frames=2), task="reference_to_video")[1]
    assert list(shown.target[:, 0, 0, 0]) == [0, 1] and shown.fps == 8.0
    np.testing.assert_array_equal(shown.references[0], picture(0))


def test_source_of_parquet_reads_the_layouts_of_omniedit_and_hqedit(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = lambda number: {"bytes": encoded(number), "path": None}  # noqa: E731
    omni = {
        "src_img": [image(n) for n in range(5)],
        "edited_img": [image(n + 10) for n in range(5)],
        "edited_prompt_list": [[f"edit {n}", "longer"] for n in range(5)],
        "unused": [1.0] * 5,
    }
    parquet.write_table(pa.table(omni), tmp_path / "omni-0.parquet", row_group_size=2)
    hq = {"input_image": [image(7)], "output_image": [image(8)], "edit": ["turn it"]}
    parquet.write_table(pa.table(hq), tmp_path / "hq.parquet")
    source = _open("parquet", tmp_path / "omni-*.parquet", task="image_editing")
    again = pickle.loads(pickle.dumps(source))
    for number in (4, 1, 0, 3):
        for reader in (source, again):
            sample = reader[number]
            assert sample.prompt == f"edit {number}"
            assert (sample.image[0, 0, 0], sample.source[0, 0, 0, 0]) == (number + 10, number)
    sample = _open("parquet", tmp_path / "hq.parquet", task="image_editing")[0]
    assert (sample.prompt, sample.image[0, 0, 0], sample.source[0, 0, 0, 0]) == ("turn it", 8, 7)
    columns = (("target", "src_img"), ("prompt", "edited_prompt_list"))
    assert _open("parquet", tmp_path / "omni-0.parquet", columns=columns)[2].image[0, 0, 0] == 2


def test_source_of_files_reads_videos_beside_their_captions(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.mp4").write_bytes(clip(13))
    (tmp_path / "deep" / "a.txt").write_text("it grows bright\n")
    source = _open("files", tmp_path, Clip(size=(8, 8), frames=5, fps=12), task="text_to_video")
    assert len(source) == 1 and source.name(0) == "deep/a"
    sample = source[0]
    assert (sample.prompt, sample.target.shape, sample.fps) == ("it grows bright", (5, 8, 8, 3), 12)
    np.testing.assert_allclose(sample.target.mean((1, 2, 3)), [0, 16, 32, 48, 64], atol=2)
    whole = _open("files", tmp_path, task="image_to_video")[0]
    assert whole.target.shape == (13, 32, 48, 3) and whole.fps == 24.0
    doubled, fps = video.decode_video(clip(5), Clip(frames=9, fps=48))  # every frame is shown twice
    assert fps == 48
    np.testing.assert_allclose(doubled.mean((1, 2, 3)), [0, 0, 8, 8, 16, 16, 24, 24, 32], atol=2)


def test_source_of_any_tfds_folder(tmp_path):
    """A folder that TFDS itself wrote, with features of its own."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name, code_path = "foreign", None

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = tfds.features.FeaturesDict({"image": image, "caption": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            yield "0", {"image": io.BytesIO(encoded(3)), "caption": "three"}

    builder = Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    sample = _open("tfds", builder.data_dir, split="test")[0]
    assert sample.prompt == "three" and sample.image[0, 0, 0] == 3
    with pytest.raises(UserError, match="it has no split 'train', but test"):
        _open("tfds", builder.data_dir)
    listed = pathlib.Path(builder.data_dir) / "features.json"
    listed.write_text(listed.read_text().replace("tensorflow_datasets.core.features.image_feature.Image", "evil.Image"))
    with pytest.raises(UserError, match=r"features\.json: a feature is of the class 'evil\.Image'"):
        _open("tfds", builder.data_dir, split="test")


# ---- Shapes ----


def test_source_is_scaled_to_cover_and_cropped_about_its_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    folder = write_rows(tmp_path, [{"target": "a.png", "prompt": "x"}])
    Image.fromarray(wide).save(folder / "a.png")
    fitted = _open("jsonl", folder, Clip(size=(10, 10)))[0].image
    assert fitted.shape == (10, 10, 3) and fitted[:, 2:8].min() > 190 and fitted[:, [0, 9]].min() > 100
    same = _open("jsonl", folder, Clip(size=(20, 60)))[0].image
    np.testing.assert_array_equal(same, wide)


def test_source_frames_are_those_shown_at_every_moment():
    assert list(frame_indices(10, 24.0, Clip(frames=5, fps=12.0))) == [0, 2, 4, 6, 8]
    assert list(frame_indices(5, 8.0, Clip(frames=3, fps=24.0))) == [0, 0, 0]
    assert list(frame_indices(11, None, Clip())) == list(range(9))
    assert [causal_frames(n) for n in (0, 1, 4, 5, 121)] == [0, 1, 1, 5, 121]
    with pytest.raises(ValueError, match="5 frames at 12 per second, 6 are wanted"):
        frame_indices(10, 24.0, Clip(frames=6, fps=12.0))


def test_source_of_an_animated_gif(tmp_path):
    folder = write_rows(tmp_path, [{"target": "a.gif", "prompt": "brighter"}])
    (folder / "a.gif").write_bytes(gif(6))
    sample = _open("jsonl", folder, Clip(frames=3, fps=5), task="text_to_video")[0]
    assert list(sample.target[:, 0, 0, 0]) == [0, 40, 80] and sample.fps == 5


def test_source_pictures_are_upright_and_transparency_lies_on_white():
    tall = Image.new("RGB", (4, 8), "red")
    exif = tall.getexif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    tall.save(buffer, "JPEG", exif=exif)
    assert decoding.decode_image(buffer.getvalue()).size == (8, 4)
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decoding.decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


# ---- Bad records: counted, logged by name, passed over up to the limit ----

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
        _open("jsonl", path, limits=limits, **options)[1]
    lenient = _open("jsonl", path, limits=limits, max_skips=1, **options)
    with caplog.at_level(logging.WARNING):
        assert lenient[1].name.endswith(":3")
    assert lenient.skipped == 1 and "row 2 is corrupt" in caplog.text
    assert lenient[1].prompt == "fine" and len(caplog.records) == 1  # once, however often it is drawn


def test_source_of_a_truncated_tar_counts_its_end_as_a_bad_record(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", pairs(4)).read_bytes()
    cut = whole.index(b"000003.png") + 550  # inside the last picture
    (tmp_path / "cut.tar").write_bytes(whole[:cut])
    source = _open("webdataset", tmp_path / "cut.tar", max_skips=2)
    assert [source[i].prompt for i in range(3)] == [f"caption {i}" for i in range(3)]
    assert source[3].prompt == "caption 0" and source.skipped in (1, 2)
    with pytest.raises(UserError, match=r"cut\.tar/000003 is corrupt \(the shard is truncated inside 000003\.png\)"):
        _open("webdataset", tmp_path / "cut.tar")[3]
    (tmp_path / "header.tar").write_bytes(whole[: whole.index(b"000003.png") + 100])
    with pytest.raises(UserError, match="the shard is truncated"):
        _open("webdataset", tmp_path / "header.tar")[3]


def test_source_of_tars_refuses_members_that_escape_link_or_repeat(tmp_path):
    import tarfile

    path = write_tar(tmp_path / "a.tar", [("../../x.png", encoded(1)), ("../../x.txt", b"x"), *pairs(1), *pairs(1)])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for index, reason in enumerate(("points outside the archive", "two members", "is a link")):
        with pytest.raises(UserError, match=reason):
            _open("webdataset", path)[index]
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=r"z\.tar: no uncompressed tar"):
        _open("webdataset", tmp_path / "z.tar")


@pytest.mark.parametrize("threads", [0, 2])
def test_source_with_only_bad_records_stops_in_the_pipeline(tmp_path, threads):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(6)])
    counted = "4" if threads == 0 else "[456]"  # other threads go on reading ahead until the pipeline stops
    for skips, message in ((3, f"{counted} corrupt so far, 3 allowed"), (10, "no readable record")):
        source = _open("webdataset", tmp_path, max_skips=skips)
        batches = iter(pipeline([Source(source)], PipelineConfig(2, threads=threads), list))
        with pytest.raises(UserError, match=message):
            next(batches)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("webdataset", "nothing", r"nothing: no \*\.tar there"),
        ("parquet", "nothing", r"nothing: no \*\.parquet there"),
        ("parquet", "text.txt", r"text\.txt: no readable parquet file"),
        ("webdataset", "text.txt", r"text\.txt: no uncompressed tar"),
        ("jsonl", "nothing", "nothing: no rows of media"),
        ("jsonl", "empty.txt", r"empty\.txt: no samples of kind 'jsonl' there"),
        ("files", "nothing", "nothing: no such folder"),
        ("tfds", "nothing", "nothing: no TFDS data set there"),
        ("records", "nothing", "nothing: no dataset there"),
    ],
)
def test_source_that_is_not_there_is_one_line(tmp_path, kind, name, message):
    pytest.importorskip("pyarrow")
    (tmp_path / "text.txt").write_text("no such thing " * 200)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        _open(kind, tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "needs a path"),
        ({"task": "dancing"}, "task is 'dancing'"),
        ({"weight": -1.0}, "must not be negative"),
        ({"kind": "edits", "task": "text_to_video"}, "edits serve for image_editing"),
        ({"columns": (("picture", "jpg"),)}, "'picture' is no part of a sample"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_source_section_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        SourceSection(**{"kind": "jsonl", "path": "x", **changes})


# ---- Videos that mean harm ----


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


def test_every_kind_of_source_has_an_opener():
    assert set(OPENERS) == set(get_args(Kind))
