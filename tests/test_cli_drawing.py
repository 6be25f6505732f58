"""`metacanvas sample` and `metacanvas edit` on tiny published folders, and what they say about bad input."""

import re

import numpy as np
import pytest
from PIL import Image
from published_support import flux_pipeline, picture, sana_pipeline, wan_pipeline
from qwen_support import tokenizer

from metacanvas_jax.cli.main import main
from metacanvas_jax.paint import runs
from metacanvas_jax.sizes import fitting_size

pytest.importorskip("diffusers")
av = pytest.importorskip("av")
pytestmark = pytest.mark.torch
QUICK = True

CONFIG = "configs/published.py"
FLOAT32 = ("--config.dit.dtype=float32", "--config.vae.dtype=float32", "--config.train.frozen_dtype=float32")
SMALL = ("--steps", "2")
WITH_MLLM = (
    *FLOAT32,
    "--config.mllm.language.dtype=float32",
    "--config.mllm.vision.dtype=float32",
    "--config.mllm.image_tokens=4",
    "--config.context_connector.dtype=float32",
    "--config.canvas_connector.dtype=float32",
    "--config.canvas.rows=2",
    "--config.canvas.columns=2",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines and a tiny Qwen2.5-VL with its tokenizer, as published."""
    from qwen_torch_support import reference_model

    place = tmp_path_factory.mktemp("published")
    for name, make in (("sana", sana_pipeline), ("flux", flux_pipeline), ("wan", wan_pipeline)):
        make().save_pretrained(place / name)
    reference_model().save_pretrained(place / "qwen")
    tokenizer().save_pretrained(place / "qwen")
    Image.fromarray(picture(40, 64)).save(place / "picture.png")
    return place


def call(command, folders, names, *options):
    variant = ",".join(str(folders / name) for name in names.split(","))
    dtypes = WITH_MLLM if "," in names else (*FLOAT32, "--config.text.encoder.dtype=float32")
    return [command, "--config", f"{CONFIG}:{variant}", *dtypes, "--prompt", "A red cat", *SMALL, *options]


def draws(out, *arguments):
    assert main([*arguments, "--out", str(out)]) == 0
    if out.suffix == ".png":
        return np.asarray(Image.open(out))
    with av.open(str(out)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_sana_paints_with_its_own_text_encoder_by_seed(folders, tmp_path):
    sana = call("sample", folders, "sana", "--size", "16x24", "--count", "1")
    one, other = (draws(tmp_path / f"{seed}.png", *sana, "--seed", str(seed)) for seed in (1, 2))
    assert one.shape == (16, 24, 3) and one.std() > 1
    assert (one != other).any()


def test_flux_edits_a_picture_that_the_mllm_reads_with_and_without_canvas(folders, tmp_path, caplog):
    flux = call("edit", folders, "flux,qwen", "--image", str(folders / "picture.png"), "--config.seed=3")
    flux += ["--config.buckets=({'task': 'text_to_image', 'size': (24, 24), 'length': 64},)"]
    edited = draws(tmp_path / "edited.png", *flux)
    assert edited.shape == (16, 32, 3)  # the area of the config, the aspect ratio of the picture
    assert "context_connector" in caplog.text  # no folder has it
    # A fresh canvas changes nothing.
    np.testing.assert_array_equal(edited, draws(tmp_path / "without.png", *flux, "--no-canvas"))


WAN = ("--size", "32x64", "--frames", "5", "--fps", "4", "--count", "1")


@pytest.mark.slow
def test_wan_draws_a_video_that_begins_with_a_picture(folders, tmp_path):
    out = tmp_path / "video.mp4"
    video = draws(out, *call("sample", folders, "wan,qwen", *WAN, "--image", str(folders / "picture.png")))
    assert video.shape == (5, 32, 64, 3)
    with av.open(str(out)) as opened:
        assert float(opened.streams.video[0].average_rate) == 4


@pytest.mark.slow
def test_wan_edits_a_video_and_shows_references(folders, tmp_path):
    reference = ("--reference", str(folders / "picture.png"))
    shown = draws(tmp_path / "shown.mp4", *call("sample", folders, "wan,qwen", *WAN, *reference, *reference))
    assert shown.shape == (5, 32, 64, 3)
    edit = call("edit", folders, "wan,qwen", *WAN[2:], "--video", str(tmp_path / "shown.mp4"))
    edited = draws(tmp_path / "edited.mp4", *edit, "--size", "32x64", "--config.dit.extra_channels=5")
    assert edited.shape == (5, 32, 64, 3)


BAD = {
    "sides": ("sample", "sana", ["--size", "18x24"], r"\(18, 24\) pixels are no multiples of 4 x 4"),
    "size": ("sample", "sana", ["--size", "18"], "expected ROWSxCOLUMNS"),
    "frames": ("sample", "wan,qwen", ["--size", "32x64", "--frames", "6"], r"expected 1 \+ 4 k frames, found 6"),
    "video of an image DiT": ("sample", "sana", ["--size", "16x16", "--frames", "5"], "makes images only"),
    "first frame of an image DiT": ("sample", "sana", ["--image", "PICTURE"], "frames"),
    "source of a DiT that reads none": ("edit", "wan,qwen", ["--image", "PICTURE"], "dit.extra_channels"),
    "nothing to edit": ("edit", "flux,qwen", [], "--image or --video"),
    "two tasks": ("edit", "flux,qwen", ["--image", "PICTURE", "--video", "PICTURE"], "give one of them"),
    "missing file": ("edit", "flux,qwen", ["--image", "nowhere.png"], "nowhere.png: no such file"),
    "no picture": ("edit", "flux,qwen", ["--image", "CONFIG"], "config.json"),
    "no video": ("edit", "wan,qwen", ["--video", "PICTURE", "--config.dit.extra_channels=5"], "no MP4 or WebM"),
    "kind of file": ("sample", "sana", ["--size", "16x16", "--out", "x.mp4"], "expected a .png file"),
    "place": ("sample", "sana", ["--size", "16x16", "--out", "BELOW"], "picture.png is no folder"),
    "steps": ("sample", "sana", ["--steps", "0"], "--steps is 0, expected at least 1"),
    "no MLLM": ("sample", "flux", [], "name an MLLM after a comma"),
    "MLLM that is none": ("sample", "wan,sana/vae", [], "the model is AutoencoderDC, expected qwen2_5_vl"),
    "missing subfolder": ("sample", "broken", [], "without the subfolder vae"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line_before_any_weight_is_read(folders, capsys, monkeypatch, case):
    command, names, options, message = BAD[case]
    broken = folders / "broken"
    if not broken.exists():
        (broken / "transformer").mkdir(parents=True)
        (broken / "model_index.json").write_text("{}")
        config = (folders / "sana" / "transformer" / "config.json").read_text()
        (broken / "transformer" / "config.json").write_text(config)
    monkeypatch.setattr(runs, "assembled", lambda *_, **__: pytest.fail("weights were read"))
    places = {"PICTURE": folders / "picture.png", "BELOW": folders / "picture.png" / "x.png"}
    places |= {"CONFIG": folders / "sana" / "transformer" / "config.json"}
    arguments = call(command, folders, names, *(str(places.get(option, option)) for option in options))
    assert re.search(message, said := fails(capsys, *arguments)), said


def test_sizes_of_an_edit_keep_area_and_aspect():
    assert fitting_size((600, 800), 512 * 512, 16) == (448, 592)
    assert fitting_size((10, 4000), 64 * 64, 16) == (16, 1280)
