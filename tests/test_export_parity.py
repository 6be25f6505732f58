"""An export in PyTorch against ``metacanvas sample`` and ``edit`` on the same run: the same noise, the same pixels.

Requests go through ``requests.sample_of`` and ``Trained.paint``, as the command line's do; nothing is derived here.
"""

import dataclasses
import itertools

import export_support as support
import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from metacanvas_jax.config.networks import autoencoder
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.data.video import decode_video, encode_mp4
from metacanvas_jax.exchange.export_run import Options, export_run
from metacanvas_jax.paint import requests, runs
from metacanvas_jax.paint.requests import Request
from metacanvas_jax.tasks import Bucket

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("av", reason="needs the [media] extra")

BUCKETS = {
    "sana": (Bucket("text_to_image", (24, 36), length=64),),
    "flux": (Bucket("text_to_image", (24, 36), length=64), Bucket("image_editing", (36, 48), length=80)),
    "flux2": (Bucket("image_editing", (36, 48), length=96),),
    "qwen_image": (Bucket("image_editing", (36, 48), length=96),),
    "wan": (
        Bucket("text_to_video", (24, 36), frames=5, fps=6.0, length=64),
        Bucket("text_to_image", (36, 36), length=72),
        Bucket("video_editing", (36, 24), frames=9, fps=6.0, length=96),
    ),
}
PROMPTS = ("a red cat", "A blue house, painted", "")
PICTURES = ("phone.jpg", "cutout.png", "odd.png", "grey.png", "palette.png", "wide.png")


@dataclasses.dataclass(frozen=True)
class Case:
    """A request: what it is about (words, image, edit, video or references), frames, pictures, prompts, canvas."""

    backbone: str
    about: str = "words"
    frames: int | None = None
    picture: str = "phone.jpg"
    prompts: tuple[str, ...] = PROMPTS[:2]
    canvas: bool = True
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = self.backbone, self.about, self.frames, self.picture.partition(".")[0], len(self.prompts), self.canvas
        return "-".join(map(str, parts))


GATE = (
    Case("sana", prompts=PROMPTS),
    Case("flux", "edit"),
    Case("flux2", "edit"),
    Case("qwen_image", "edit", prompts=PROMPTS[1:]),
    Case("wan", "image", 5, "cutout.png"),
    Case("wan", "video"),
)
ABOUT = {
    "sana": [("words", None)],
    "flux": [("words", None), ("edit", None)],
    "flux2": [("words", None), ("edit", None)],
    "qwen_image": [("words", None), ("edit", None)],
    "wan": [
        *itertools.product(("words",), (None, 1, 9)),
        *itertools.product(("image", "references"), (None, 9)),
        *itertools.product(("video",), (None, 5)),
        ("edit", 1),
    ],
}
WHOLE = [
    Case(backbone, about, frames, picture, prompts, canvas)
    for backbone, abouts in ABOUT.items()
    for about, frames in abouts
    for number, picture in enumerate(PICTURES if about in ("image", "edit", "references") else PICTURES[:1])
    for prompts, canvas in ([((PROMPTS[0],), True), (PROMPTS[:2], False)] if number == 0 else [(PROMPTS[:1], True)])
] + [Case("flux", "edit", size=(48, 24)), Case("flux", size=(48, 48)), Case("wan", "image", 5, size=(48, 24))]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles without optimising: the networks are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Pictures of every kind that a camera or an editor writes, and a video."""
    folder = tmp_path_factory.mktemp("media")
    smooth = lambda rows, columns, seed: Image.fromarray(  # noqa: E731
        np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    ).resize((columns, rows), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    smooth(60, 84, 1).save(folder / "phone.jpg", exif=exif, quality=95)
    cutout = smooth(50, 41, 2).convert("RGBA")
    cutout.putalpha(Image.linear_gradient("L").resize((41, 50)))
    cutout.save(folder / "cutout.png")
    smooth(37, 53, 3).save(folder / "odd.png")
    smooth(48, 48, 4).convert("L").save(folder / "grey.png")
    smooth(33, 48, 5).convert("P").save(folder / "palette.png", transparency=3)
    smooth(30, 90, 6).save(folder / "wide.png")
    frames = np.stack([np.asarray(smooth(40, 66, seed)) for seed in range(20)])
    (folder / "video.mp4").write_bytes(encode_mp4(frames, 12.0))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """``pair(backbone)``: a run as the command line loads it, and its export as a pipeline."""
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    folder, made = tmp_path_factory.mktemp("runs"), {}
    support.save_qwen(folder)

    def make(backbone):
        if backbone not in made:
            place = folder / backbone
            config = support.config(folder, backbone, buckets=base.buckets(*BUCKETS[backbone]))
            config.mllm.image_tokens = 4
            if backbone == "flux":
                config.canvas.latents_per_cell = 3
            config.vae_weights = str(support.save_patch_pca(place / "pca"))
            if backbone == "sana":
                config.text = support.save_text_encoder(place / "gemma")
            else:
                config.dit_weights = str(support.save_transformer(backbone, place / "transformer"))
            support.save_run(place / "run", config, support.trained_leaves(config))
            export_run(place / "run", place / "out", Options(progress=False))
            made[backbone] = runs.load(place / "run"), MetaCanvasPipeline.from_pretrained(place / "out")
        return made[backbone]

    return make


def request(case, media, prompt):
    """The request as ``cli/drawing.py`` makes it."""
    picture, name = media / case.picture, case.about
    return Request(
        prompt,
        image=picture if name in ("image", "edit") else None,
        video=media / "video.mp4" if name == "video" else None,
        references=(picture, media / "odd.png") if name == "references" else (),
        edit=name in ("edit", "video"),
        size=case.size,
        frames=case.frames,
    )


def arguments(case, media):
    """The same as a user of the pipeline has it."""
    size = case.size or (None, None)
    shape = {"frames": case.frames, "height": size[0], "width": size[1]}
    if case.about == "video":
        frames, fps = decode_video((media / "video.mp4").read_bytes(), Clip())
        return shape | {"video": [Image.fromarray(frame) for frame in frames], "fps": fps}
    if case.about == "references":
        return shape | {"references": [opened(media / case.picture), opened(media / "odd.png")]}
    return shape if case.about == "words" else shape | {"image": opened(media / case.picture)}


def opened(file):
    """A picture as a user opens it: not turned, not converted."""
    with Image.open(file) as picture:
        picture.load()
        return picture


def compare(case, pair, media, monkeypatch):
    trained, pipeline = pair(case.backbone)
    asked = [requests.sample_of(trained.setup, request(case, media, prompt)) for prompt in case.prompts]
    samples, (shape, *_) = zip(*asked, strict=True)
    ours = trained.paint(list(samples), shape, seed=3, canvas=case.canvas).pixels
    grid = (len(samples), *latent_grid(trained.setup, shape), autoencoder(trained.setup).channels)
    noise = np.array(jax.random.normal(jax.random.fold_in(jax.random.key(3), 0), grid))

    def same_noise(count, grid, seed):
        assert (count, *grid) == noise.shape[:4]
        return torch.from_numpy(noise).movedim(-1, 1)

    monkeypatch.setattr(pipeline, "noise", same_noise)
    painted = pipeline(list(case.prompts), canvas=case.canvas, **arguments(case, media))
    videos = painted if shape.frames > 1 else [[picture] for picture in painted]
    theirs = np.stack([np.stack([np.asarray(frame) for frame in video]) for video in videos])
    assert theirs.shape == ours.shape
    difference = np.abs(theirs.astype(int) - ours.astype(int))
    assert difference.max() <= 1, f"differs by {difference.max()}, on average {difference.mean():.2f}"
    assert ours.std() > 10, "a picture of nothing"


@pytest.mark.parametrize("case", GATE, ids=str)
def test_export_paints_what_the_command_line_paints(case, pair, media, monkeypatch):
    compare(case, pair, media, monkeypatch)


@pytest.mark.parametrize(("size", "grid"), [((24, 48), (1, 1, 3)), ((72, 36), (1, 4, 2)), ((36, 60), (1, 2, 3))])
def test_a_canvas_of_an_export_follows_the_latents_as_in_training(pair, size, grid):
    """A cell covers 3 x 3 latents of 6 x 6 pixels; the embeddings are 2 x 3."""
    trained, pipeline = pair("flux")
    shape = pipeline.rules.shape("text_to_image", height=size[0], width=size[1])
    assert pipeline.plan(PROMPTS[:1], shape=shape).canvas.shape[1:4] == grid
    bucket = dataclasses.replace(trained.setup.shapes[0], size=size)
    assert trained.setup.canvas.shape_for(latent_grid(trained.setup, bucket)) == grid


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_export_paints_what_the_command_line_paints_for_every_request(case, pair, media, monkeypatch):
    compare(case, pair, media, monkeypatch)
