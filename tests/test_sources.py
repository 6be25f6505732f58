"""Every layout of data: what is read, what is refused, and that nothing harmful is decoded."""

import io
import json
import pathlib
import pickle
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from sources_support import (
    clip,
    encoded,
    gif,
    opened,
    pairs,
    picture,
    write_rows,
    write_tar,
)

from metacanvas_jax.config.sources import Kind, SourceSection
from metacanvas_jax.data import decoding, video
from metacanvas_jax.data.formats import tars
from metacanvas_jax.data.formats.array_records import raw
from metacanvas_jax.data.sources import OPENERS
from metacanvas_jax.data.transforms import Clip, causal_frames, frame_indices
from metacanvas_jax.errors import UserError

# ---- Layouts ----


def test_source_of_tars_reads_pairs_at_random_through_an_index_made_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", pairs(3))
    write_tar(tmp_path / "b.tar", pairs(2, start=3))
    source = opened("webdataset", tmp_path)
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
    assert len(opened("webdataset", tmp_path / "*.tar")) == 5
    monkeypatch.undo()
    write_tar(tmp_path / "a.tar", pairs(1))  # another file under the name
    assert len(opened("webdataset", tmp_path / "a.tar")) == 1
    assert len(opened("webdataset", tmp_path / "b.tar", cache=str(tmp_path / "cache"))) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_source_of_tars_reads_captions_inside_json(tmp_path):
    data = json.dumps({"caption": "a cat", "size": [1, 2]}).encode()
    write_tar(tmp_path / "a.tar", [("x.json", data), ("x.jpg", encoded(9, "JPEG"))])
    assert opened("webdataset", tmp_path)[0].prompt == "a cat"
    columns = (("prompt", "json.caption"), ("target", "jpg"))
    assert opened("webdataset", tmp_path, columns=columns)[0].prompt == "a cat"
    with pytest.raises(UserError, match=r"a\.tar/x is corrupt \(missing key 'json\.text' for the prompt; there are"):
        opened("webdataset", tmp_path, columns=(("prompt", "json.text"),))[0]


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
    edit = opened("jsonl", folder, task="image_editing")[0]
    assert (edit.prompt, edit.image[0, 0, 0], edit.source[0, 0, 0, 0]) == ("make it blue", 5, 6)
    shown = opened("jsonl", folder / "metadata.jsonl", Clip(frames=2), task="reference_to_video")[1]
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
    source = opened("parquet", tmp_path / "omni-*.parquet", task="image_editing")
    again = pickle.loads(pickle.dumps(source))
    for number in (4, 1, 0, 3):
        for reader in (source, again):
            sample = reader[number]
            assert sample.prompt == f"edit {number}"
            assert (sample.image[0, 0, 0], sample.source[0, 0, 0, 0]) == (number + 10, number)
    sample = opened("parquet", tmp_path / "hq.parquet", task="image_editing")[0]
    assert (sample.prompt, sample.image[0, 0, 0], sample.source[0, 0, 0, 0]) == ("turn it", 8, 7)
    columns = (("target", "src_img"), ("prompt", "edited_prompt_list"))
    assert opened("parquet", tmp_path / "omni-0.parquet", columns=columns)[2].image[0, 0, 0] == 2


def test_source_of_files_reads_videos_beside_their_captions(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.mp4").write_bytes(clip(13))
    (tmp_path / "deep" / "a.txt").write_text("it grows bright\n")
    source = opened("files", tmp_path, Clip(size=(8, 8), frames=5, fps=12), task="text_to_video")
    assert len(source) == 1 and source.name(0) == "deep/a"
    sample = source[0]
    assert (sample.prompt, sample.target.shape, sample.fps) == ("it grows bright", (5, 8, 8, 3), 12)
    np.testing.assert_allclose(sample.target.mean((1, 2, 3)), [0, 16, 32, 48, 64], atol=2)
    whole = opened("files", tmp_path, task="image_to_video")[0]
    assert whole.target.shape == (13, 32, 48, 3) and whole.fps == 24.0
    doubled, fps = video.decode_video(clip(5), Clip(frames=9, fps=48))  # every frame is shown twice
    assert fps == 48
    np.testing.assert_allclose(doubled.mean((1, 2, 3)), [0, 0, 8, 8, 16, 16, 24, 24, 32], atol=2)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_source_of_a_table_reads_edits_and_quoted_captions(tmp_path, delimiter):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(encoded(number))
    lines = [
        ["file_name", "text", "source"],
        ["pictures/1.png", f'"a cat{delimiter}\nasleep"', ""],
        ["pictures/2.png", "make it blue", "pictures/3.png"],
        ["../2.png", "outside", ""],
        ["pictures/1.png", "too", "many", "fields"],
    ]
    text = "\ufeff" + "\r\n".join(delimiter.join(line) for line in lines) + "\r\n\r\n"
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    source = opened("csv", tmp_path, max_skips=2)
    assert len(source) == 4 and source[0].prompt == f"a cat{delimiter}\nasleep"
    np.testing.assert_array_equal(source[0].image, picture(1))
    edit = opened("csv", tmp_path, task="image_editing", max_skips=3)[1]
    np.testing.assert_array_equal(edit.source, picture(3)[None])
    assert source.try_read(2) is None and source.try_read(3) is None and source.skipped == 2
    assert source.key(0) == source.key(3) == "pictures/1.png"


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
    sample = opened("tfds", builder.data_dir, split="test")[0]
    assert sample.prompt == "three" and sample.image[0, 0, 0] == 3
    with pytest.raises(UserError, match="it has no split 'train', but test"):
        opened("tfds", builder.data_dir)
    listed = pathlib.Path(builder.data_dir) / "features.json"
    listed.write_text(listed.read_text().replace("tensorflow_datasets.core.features.image_feature.Image", "evil.Image"))
    with pytest.raises(UserError, match=r"features\.json: a feature is of the class 'evil\.Image'"):
        opened("tfds", builder.data_dir, split="test")


# ---- Shapes ----


def test_source_is_scaled_to_cover_and_cropped_about_its_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    folder = write_rows(tmp_path, [{"target": "a.png", "prompt": "x"}])
    Image.fromarray(wide).save(folder / "a.png")
    fitted = opened("jsonl", folder, Clip(size=(10, 10)))[0].image
    assert fitted.shape == (10, 10, 3) and fitted[:, 2:8].min() > 190 and fitted[:, [0, 9]].min() > 100
    same = opened("jsonl", folder, Clip(size=(20, 60)))[0].image
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
    sample = opened("jsonl", folder, Clip(frames=3, fps=5), task="text_to_video")[0]
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


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("webdataset", "nothing", r"nothing: no \*\.tar there"),
        ("parquet", "nothing", r"nothing: no \*\.parquet there"),
        ("parquet", "text.txt", r"text\.txt: no readable parquet file"),
        ("webdataset", "text.txt", r"text\.txt: no uncompressed tar"),
        ("jsonl", "nothing", "nothing: no rows of media"),
        ("jsonl", "empty.txt", r"empty\.txt: no samples of kind 'jsonl' there"),
        ("csv", "nothing", "nothing: no such file"),
        ("csv", "empty.txt", r"empty\.txt: no samples of kind 'csv' there"),
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
        opened(kind, tmp_path / name)
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
        ({"validation": 1.0}, "validation is 1.0"),
    ],
)
def test_source_section_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        SourceSection(**{"kind": "jsonl", "path": "x", **changes})


def test_every_kind_of_source_has_an_opener():
    assert set(OPENERS) == set(get_args(Kind))


def test_every_kind_of_tfds_feature_is_left_as_it_lies_in_the_record():
    import tensorflow_datasets as tfds

    picture = tfds.features.Image(shape=(None, None, 3))
    known = tfds.features.FeaturesDict(
        {
            "one": picture,
            "frames": tfds.features.Sequence({"picture": picture, "label": np.int64}),
            "several": tfds.features.Sequence(picture),
            "inner": {"text": tfds.features.Text(), "numbers": tfds.features.Tensor(shape=(2,), dtype=np.float32)},
        }
    )
    values = {
        "one": io.BytesIO(encoded(1)),
        "frames": [{"picture": io.BytesIO(encoded(n)), "label": n} for n in (2, 3)],
        "several": [io.BytesIO(encoded(n)) for n in (4, 5, 6)],
        "inner": {"text": "ü", "numbers": [0.5, 2.0]},
    }
    record = known.serialize_example(known.encode_example(values))
    found = known.deserialize_example_np(record, decoders=raw(known))
    assert found["one"] == encoded(1) and found["inner"]["text"] == "ü".encode()
    assert list(found["frames"]["picture"]) == [encoded(2), encoded(3)]
    assert list(found["frames"]["label"]) == [2, 3] and list(found["inner"]["numbers"]) == [0.5, 2.0]
    assert list(found["several"]) == [encoded(n) for n in (4, 5, 6)]
