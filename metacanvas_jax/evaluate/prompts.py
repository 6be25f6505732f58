"""Draws a file of prompts into a folder, one result a line, with a contact sheet: for ``sample`` and in a training.

Beside the results lie ``recipe.json``, which says how they were drawn, and ``prompts.jsonl``, which says from what. A
folder that was begun otherwise is refused: the same command goes on where it was stopped, and nothing is overwritten.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import folders
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import prompt_lines, tree
from metacanvas_jax.evaluate.benchmarks import base, runner
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.prompt_lines import Line
from metacanvas_jax.paint import requests
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.paint.requests import Request
from metacanvas_jax.report import pictures
from metacanvas_jax.types import Params

RECIPE, PROMPTS, SHEET = "recipe.json", "prompts.jsonl", "sheet.png"
FIRST = Clip(None, 1, None)  # the first frame of a video
CELL, SHOWN = 256, 96  # pixels of a side of a cell of the contact sheet, and the most results on it


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A folder of results: how many there are, and how many of them were drawn now."""

    out: Path
    entries: int
    results: int

    def table(self) -> str:
        """The same in words."""
        return f"{self.entries} results in {self.out}, {self.results} of them drawn now; all at a glance: {SHEET}"

    def metrics(self) -> dict[str, float]:
        """None: nothing is scored."""
        return {}

    def save(self, path: Path) -> None:
        """The same as JSON."""
        files.write(path, json.dumps(dataclasses.asdict(self) | {"out": str(self.out)}, indent=1) + "\n")


def check(setup: Experiment, asked: Asked) -> None:
    """Raises UserError for a file of prompts that is missing, bad, or asks for what the run cannot draw."""
    entries(setup, lines_of(asked))


def evaluate(painter: Painter, params: Params, asked: Asked) -> Drawn:
    """Draws the file ``asked.data`` into the folder ``asked.out``, in a training into ``prompts`` below it."""
    lines, out = lines_of(asked), asked.out
    if out is None:
        raise UserError("the evaluator prompts needs --out: the folder of its results")
    return draw(painter, params, lines, dataclasses.replace(asked, out=out / "prompts" if asked.training else out))


def lines_of(asked: Asked) -> list[Line]:
    """The prompts that an evaluation asks for."""
    if not asked.data:
        raise UserError("the evaluator prompts needs its file of prompts: --data, or eval.data in a config")
    return prompt_lines.read(files.folder(asked.data), Request(""))[: asked.limit]


def entries(setup: Experiment, lines: Sequence[Line], count: int = 1) -> list[tree.Entry]:
    """What is drawn: ``count`` results of every line. Raises UserError for what the run cannot draw."""
    made = []
    for line in lines:
        try:
            request = _sized(setup, line.request)
            shape = requests.bucket(setup, request)
        except UserError as error:
            raise UserError(f"{line.where}: {error}") from error
        ending = ".mp4" if shape.frames > 1 else ".png"
        for number in range(count):
            path = f"{line.name}{f'_{number}' if count > 1 else ''}{ending}"
            save = base.one_mp4(path, shape.fps) if shape.frames > 1 else base.one_png(path)
            read = lambda request=request: requests.sample_of(setup, request)[0]  # noqa: E731
            made.append(tree.Entry(line.noise, shape, read, save, (path,), (number,)))
    return made


def _sized(setup: Experiment, request: Request) -> Request:
    """An edit without a size has that of its source, in few aspect ratios, so that few shapes are compiled."""
    task = request.task(setup)
    if request.size is not None or not request.edit:
        return request
    if request.video is not None:
        frame = requests.read_video(request.video, FIRST)[0]
    else:
        frame = requests.read_image(request.image if request.image is not None else Path())
    return dataclasses.replace(request, size=base.edit_size(setup, task, frame.shape[:2]))


def prepare(setup: Experiment, lines: Sequence[Line], out: Path, count: int) -> list[tree.Entry]:
    """The entries, after all that can be wrong with them was looked at. Raises UserError as ``draw``."""
    made = entries(setup, lines, count)
    tree.check(made, out)
    _rows(lines, made, out)
    return made


def draw(
    painter: Painter, params: Params, lines: Sequence[Line], asked: Asked, *, count: int = 1, **options: Any
) -> Drawn:
    """Draws ``count`` results of every line into ``asked.out``, or what is missing there; ``options`` are further ones
    of ``Painter.program``.

    Raises UserError for what the run cannot draw, and for a folder that holds other results.
    """
    setup, out = painter.setup, asked.out
    made = prepare(setup, lines, out, count)
    drawn_with = runner.recipe("prompts", setup, asked) | {"folders": folders(setup)} | options
    if options.get("steps") is None:
        drawn_with["steps"] = setup.sampler.steps
    runner.begin(out, drawn_with, out / RECIPE)
    if jax.process_index() == 0:
        rows = _rows(lines, made, out)
        files.write(out / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows.values()))
    each = min(asked.each or setup.eval.per_device, len(made))
    options |= {"guidance": asked.guidance, "canvas": asked.canvas}
    results = tree.draw(painter, params, made, out, each=each, seed=asked.seed or 0, progress=asked.progress, **options)
    if jax.process_index() == 0:
        captions = [line.request.prompt for line in lines for _ in range(count)]
        files.write(out / SHEET, pictures.png(sheet(out, [entry.paths[0] for entry in made], captions)))
    return Drawn(out, len(made), results)


def sheet(out: Path, paths: Sequence[str], captions: Sequence[str]) -> UInt8[np.ndarray, "H W 3"]:
    """The first results of a folder with their prompts; of a video its first frame."""
    there = files.listing(out)
    shown = [(path, caption) for path, caption in zip(paths, captions, strict=True) if path in there][:SHOWN]
    return pictures.grid([_cell(out / path) for path, _ in shown], [caption for _, caption in shown], columns=6)


def _cell(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    video = path.suffix == ".mp4"
    found = requests.read_video(path, FIRST)[0] if video else requests.read_image(path)
    small = ImageOps.pad(Image.fromarray(found), (CELL, CELL), Image.Resampling.BICUBIC, color=(255, 255, 255))
    return np.asarray(small)


def _rows(lines: Sequence[Line], made: Sequence[tree.Entry], out: Path) -> dict[str, Mapping[str, Any]]:
    """What every file of the folder was drawn from, with what is drawn now. Raises UserError where they contradict."""
    count = len(made) // len(lines)
    there = files.listing(out)
    known = {str(row.get("file")): row for row in base.json_lines(out / PROMPTS)} if PROMPTS in there else {}
    rows = dict(known)
    for place, entry in enumerate(made):
        (path,), line = entry.paths, lines[place // count]
        row = {"file": path, **line.row()}
        if path in known and known[path] != row:
            raise UserError(
                f"{out / path} belongs to the prompt {known[path].get('prompt')!r} as it was asked for before; "
                f"{line.where} asks for something else: give another --out"
            )
        if path in there and path not in known:
            raise UserError(f"{out / path} is there and was not drawn from these prompts: give another --out")
        rows[path] = row
    return rows
