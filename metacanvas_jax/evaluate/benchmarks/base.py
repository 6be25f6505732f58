"""What a benchmark is, and what benchmarks have in common."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import LIMITS
from metacanvas_jax.data.decoding import MediaError, decode_image, encode_png
from metacanvas_jax.data.video import encode_mp4
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.evaluate.tree import Entry, Frames
from metacanvas_jax.paint import requests
from metacanvas_jax.paint.requests import Request
from metacanvas_jax.sizes import fitting_size, nearest_size

ASPECTS = (1.0, 9 / 8, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Of the sides of edits, and their inverses: each is compiled once, however many sizes the pictures have."""

Scores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One public benchmark.

    ``entries(setup, data)`` reads its prompts and media below ``data``. ``command(out, data, scores)`` is the official
    command that scores the tree ``out`` and writes its results below ``scores``. ``scores(folder, data)`` reads them:
    the first is the one of the paper's table. ``paper`` are its figures there.
    """

    title: str
    entries: Callable[[Experiment, str], list[Entry]]
    command: Callable[[Path, str, Path], str]
    scores: Callable[[Path], Scores]
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    needs_data: bool = True


def entry(
    setup: Experiment,
    name: str,
    request: Request,
    paths: Iterable[str],
    made: Callable[[list[Frames]], Mapping[str, bytes]],
    *,
    numbers: tuple[int, ...] = (0,),
    media: Callable[[], Mapping[str, Any]] | None = None,
) -> Entry:
    """An entry of a request; ``media`` are fields of the request that are read when it is drawn.

    Raises UserError for a task that the run does not draw.
    """
    task = request.task(setup)
    if task not in {bucket.task for bucket in setup.shapes} and task not in ("text_to_image", "text_to_video"):
        tasks = ", ".join(dict.fromkeys(bucket.task for bucket in setup.shapes))
        raise UserError(f"this benchmark is one of {task}, which the run does not draw; it draws {tasks}")
    shape = requests.bucket(setup, request)

    def sample():
        filled = request if media is None else dataclasses.replace(request, **media())
        return requests.sample_of(setup, filled)[0]

    return Entry(name, shape, sample, made, tuple(paths), numbers)


def one_png(path: str, **others: bytes) -> Callable[[list[Frames]], Mapping[str, bytes]]:
    """The only frame of the only result as a PNG."""
    return lambda results: {path: encode_png(results[0][0])}


def one_mp4(path: str, fps: float) -> Callable[[list[Frames]], Mapping[str, bytes]]:
    """The only result as an MP4."""
    return lambda results: {path: encode_mp4(results[0], fps)}


def picture(data: bytes, where: str) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of a benchmark. Raises UserError that names ``where`` it is."""
    try:
        return np.asarray(decode_image(data))
    except MediaError as error:
        raise UserError(f"{where}: {error}") from error


def picture_in(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in a file. Raises UserError for one that is missing or cannot be decoded."""
    return picture(files.read_bytes(path, LIMITS.bytes), str(path))


def sides_of(data: bytes, where: str) -> tuple[int, int]:
    """(rows, columns) of a picture as it is shown, from its header. Raises UserError that names ``where`` it is."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: no readable picture ({first_line(error)})") from error


def edit_size(setup: Experiment, task: str, sides: tuple[int, int]) -> tuple[int, int]:
    """The shape of an edit: the nearest of the sizes of a run whose samples are sorted by size.

    In other runs it is that of ``ASPECTS`` that is nearest to the picture, with the area of the run's pictures.
    """
    if sizes := setup.sizes_of(task):
        return nearest_size(sides, sizes)
    ratio = sides[1] / sides[0]
    known = (*ASPECTS, *(1 / aspect for aspect in ASPECTS[1:]))
    near = min(known, key=lambda aspect: abs(math.log(aspect / ratio)))
    return fitting_size((1.0, near), math.prod(requests.nearest(setup, task).size), requests.unit(setup))


def resized(pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The whole picture in another size; its aspect ratio may change a little."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def with_aspect_of(pixels: UInt8[np.ndarray, "h w 3"], sides: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with the aspect ratio of what was edited, and about as many pixels as it has."""
    scale = math.sqrt(pixels.shape[0] * pixels.shape[1] / (sides[0] * sides[1]))
    size = (max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale)))
    return pixels if size == pixels.shape[:2] else resized(pixels, size)


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text in a row of a benchmark. Raises UserError for one that is missing or no text."""
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {key!r} is {value!r}, expected a text; is it the benchmark's own file?")
    return value


def file_name(text: str, where: str) -> str:
    """A text that is part of a file's name. Raises UserError for one that no file can have."""
    if not text or "/" in text or "\0" in text or text in (".", ".."):
        raise UserError(f"{where}: {text!r} cannot be the name of a file")
    return text


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises UserError for a line that is no JSON object."""
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The same with the number of each row's line, from 1."""
    rows = []
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append((number, row))
    return rows


def found(folder: Path, *names: str) -> Path:
    """The first of some files that is there, in ``folder`` or as ``folder`` itself. Raises UserError if none is."""
    if folder.is_file():
        return folder
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {' or '.join(names)} there")
