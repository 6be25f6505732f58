"""From what a user asks for to a sample of a task, in a shape that the experiment can draw; on the host.

All errors that a request can cause are raised here, before any weight is read.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax import files
from metacanvas_jax.config.check import check_bucket
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import LIMITS
from metacanvas_jax.data.decoding import MediaError, decode_image
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.transforms import Clip, fit_frames
from metacanvas_jax.data.video import container_of, decode_video, encode_mp4
from metacanvas_jax.errors import UserError
from metacanvas_jax.report import pictures
from metacanvas_jax.sizes import fitting_size, nearest_size
from metacanvas_jax.tasks import TASKS, Bucket

Frames = UInt8[np.ndarray, "t h w 3"]
Picture = Path | UInt8[np.ndarray, "h w 3"]
"""A picture, or the file that it is in."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what goes with it.

    ``image`` is where a video begins, or, with ``edit``, what is changed; so is ``video``. ``references`` are pictures
    that the result is to show. ``size`` (rows, columns), ``frames`` and ``fps`` are those of the result; None leaves
    them to the config, and the sides of an edit to what is edited (`source_size`).
    """

    prompt: str
    image: Picture | None = None
    video: Path | None = None
    references: tuple[Picture, ...] = ()
    edit: bool = False
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None

    def task(self, setup: Experiment) -> str:
        """Which task it is. Raises UserError for media that belong to none."""
        given = [name for name, there in (("--image", self.image), ("--video", self.video)) if there is not None]
        given += ["--reference"] * bool(self.references)
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are of different tasks: give one of them")
        if self.edit and given not in (["--image"], ["--video"]):
            raise UserError("an edit needs what is to be changed: --image or --video")
        if self.edit:
            return "image_editing" if self.image is not None else "video_editing"
        if self.video is not None:
            raise UserError("a video is changed by `metacanvas edit`; `metacanvas sample` begins with an --image")
        if self.image is not None:
            return "image_to_video"
        if self.references:
            return "reference_to_video"
        makes_video = self.frames > 1 if self.frames is not None else setup.shapes[0].frames > 1
        return "text_to_video" if makes_video else "text_to_image"


def nearest(setup: Experiment, task: str, size: tuple[int, int] | None = None) -> Bucket:
    """The config's bucket of a task, or the nearest kin: the first that makes the same, or the first of all.

    Of a task whose samples are sorted by size it is the bucket of this ``size``, where there is one. It is always one
    for prompts of any length.
    """
    by_size = size in setup.sizes_of(task)
    makes = TASKS[task].makes
    kin = [b for b in setup.drawn if b.task == task] or [b for b in setup.drawn if TASKS[b.task].makes == makes]
    return next((b for b in kin if by_size and b.size == size), (kin or setup.drawn)[0])


def source_size(setup: Experiment, task: str, sides: tuple[int, int]) -> tuple[int, int] | None:
    """The size of a result that has a source picture of (rows, columns), where the request names none.

    Of a task whose samples are sorted by size it is the nearest of its sizes. Another edit has the aspect ratio of its
    source, and the area of the bucket. None: the source does not decide.
    """
    if sizes := setup.sizes_of(task):
        return nearest_size(sides, sizes)
    if TASKS[task].vae == "source":
        return fitting_size(sides, math.prod(nearest(setup, task).size), unit(setup))
    return None


def bucket(setup: Experiment, request: Request, source: Frames | None = None) -> Bucket:
    """The shape of the result: that of the nearest bucket of the config, as the request changes it.

    Raises UserError for sizes and frames that the autoencoder or the DiT cannot have.
    """
    task = request.task(setup)
    size = request.size
    if size is None and source is not None:
        size = source_size(setup, task, source.shape[1:3])
    near = nearest(setup, task, size)
    frames = request.frames or (1 if TASKS[task].makes == "image" else near.frames)
    try:
        chosen = dataclasses.replace(
            near,
            task=task,
            size=size or near.size,
            frames=frames,
            fps=request.fps or near.fps,
            references=len(request.references),
            batch=1,
        )
    except ValueError as error:
        raise UserError(f"{task}: {error}") from error
    check_bucket(setup, chosen, task)
    return chosen


def unit(setup: Experiment) -> int:
    """Pixels that the sides of a result are multiples of."""
    patch = network(setup).dit.patch
    return autoencoder(setup).spatial * math.lcm(*patch[1:])


def sample_of(setup: Experiment, request: Request) -> tuple[Sample, Bucket]:
    """The request as a sample, whose target is blank but for the first frame of image-to-video, and its shape.

    Raises UserError for files that are missing or cannot be decoded, and for shapes that cannot be drawn.
    """
    task, source = request.task(setup), None
    if request.image is not None:
        source = read_image(request.image)[None]
    shape = bucket(setup, request, source)
    if request.video is not None:
        source = read_video(request.video, Clip(None, shape.frames, shape.fps))
        shape = bucket(setup, request, source)
    target = np.zeros((shape.frames, *shape.size, 3), np.uint8)
    references = tuple(fit_frames(read_image(path)[None], shape.size)[0] for path in request.references)
    if source is not None:
        source = fit_frames(source, shape.size)
    if task == "image_to_video":
        target[0], source = source[0], None
    fps = shape.fps if shape.frames > 1 else None
    return Sample(request.prompt, target, task=task, source=source, references=references, fps=fps), shape


def read_image(path: Picture) -> UInt8[np.ndarray, "h w 3"]:
    """A picture from a file. Raises UserError for one that is missing or cannot be decoded."""
    if isinstance(path, np.ndarray):
        return path
    try:
        return np.asarray(decode_image(files.read_bytes(path, LIMITS.bytes)))
    except MediaError as error:
        raise UserError(f"{path}: {error}") from error


def read_video(path: Path, clip: Clip) -> Frames:
    """A clip of a video file. Raises UserError for one that is missing, cannot be decoded or is too short."""
    data = files.read_bytes(path, LIMITS.bytes)
    if container_of(data) is None:
        raise UserError(f"{path}: no MP4 or WebM video")
    try:
        return decode_video(data, clip)[0]
    except MediaError as error:
        raise UserError(f"{path}: {error}") from error


def save(results: UInt8[np.ndarray, "n t h w 3"], fps: float, out: Path) -> None:
    """Results in one file: side by side in an MP4, or as a PNG, which is a sheet where there are several."""
    if out.suffix.lower() == ".mp4":
        data = encode_mp4(np.concatenate(list(results), axis=2), fps)
    elif len(results) == 1:
        data = pictures.png(results[0, 0])
    else:
        data = pictures.png(pictures.grid(list(results[:, 0]), columns=len(results)))
    files.write(out, data)
