"""What training shows of its progress: for every task what was given, the target, and what was painted."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from metacanvas_jax import files
from metacanvas_jax.data import by_size
from metacanvas_jax.data.inputs import Inputs, sources_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.paint.painter import Painter, blank, from_words
from metacanvas_jax.report import pictures
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.types import Params
from metacanvas_jax.worlds.requests import JUDGED
from metacanvas_jax.worlds.scenes import eval_prompts

SAMPLES, FRAMES = 4, 3  # of a task, and of a video (first, middle, last)
LINE = 160  # grey of the lines between the parts of a preview
PROMPTS = 16  # of a run on its world's pictures


def write(painter: Painter, params: Params, folder: files.Path, step: int) -> dict[str, pictures.Picture]:
    """One PNG of every bucket, or of prompts where a run paints the pictures of its world; returns them by name."""
    sheets = {}
    for samples, bucket in shown(painter):
        prompts, drawn = [sample.prompt for sample in samples], painter.paint(params, samples, bucket).pixels
        if painter.setup.sources:
            strips, headings = side_by_side(samples, drawn, bucket)
            name, sheet = f"_{bucket.task}", pictures.grid(strips, prompts, columns=1, headings=headings)
        else:
            name, sheet = "", pictures.grid(list(drawn[:, 0]), prompts, columns=4)
        if jax.process_index() == 0:
            files.write(folder / f"{step:08d}{name}.png", pictures.png(sheet))
        sheets[f"previews/{bucket.task}"] = sheet
    return sheets


def shown(painter: Painter) -> list[tuple[list[Sample], Bucket]]:
    """What a run draws to show its progress: prompts of its world, or the first samples of every bucket."""
    setup = painter.setup
    if setup.sources:
        return [(samples_of(painter.inputs, bucket), bucket) for bucket in by_size.looked_at(setup)]
    scenes = eval_prompts(setup.world, "seen", -(-PROMPTS // len(JUDGED)), JUDGED)[:PROMPTS]
    bucket = from_words(setup.drawn[0])
    return [([blank(scene.prompt, bucket) for scene in scenes], bucket)]


def samples_of(inputs: Inputs, bucket: Bucket) -> list[Sample]:
    """The first samples of a bucket's first source: of those that it keeps out of the training, where it keeps some.

    Raises UserError when it is not there.

    A source that holds the first frame of its targets only shows that frame in place of the others.
    """
    kept = sources_of(inputs.experiment, bucket, validation=True)
    records = (kept or sources_of(inputs.experiment, bucket))[0].records
    examples = inputs.examples(bucket)
    samples = [records[i] for i in range(min(SAMPLES, len(records)))]
    return [
        examples.fitted(dataclasses.replace(sample, target=np.repeat(sample.target, bucket.frames, axis=0)))
        if len(sample.target) < bucket.frames
        else examples.fitted(sample)
        for sample in samples
    ]


def side_by_side(
    samples: Sequence[Sample], painted: UInt8[np.ndarray, "n t h w 3"], bucket: Bucket
) -> tuple[list[UInt8[np.ndarray, "H W 3"]], list[tuple[str, int]]]:
    """One picture per sample: what the DiT was given, the target, what was drawn; and their names and widths.

    A grey line stands between them, as many pictures have a white ground.
    """
    made, headings = [], []
    for sample, pixels in zip(samples, painted, strict=True):
        parts = {"source": sample.source, "first frame": sample.target[:1], "references": sample.references}
        given = TASKS[bucket.task].vae
        rows = {} if parts.get(given) is None else {given: np.stack(list(parts[given]))}
        strips = {name: _strip(video) for name, video in (rows | {"target": sample.target, "drawn": pixels}).items()}
        line = np.full((pixels.shape[1], 1, 3), LINE, np.uint8)
        strips = {
            name: strip if name == "drawn" else np.concatenate([strip, line], axis=1) for name, strip in strips.items()
        }
        made.append(np.concatenate(list(strips.values()), axis=1))
        headings = [(name, strip.shape[1]) for name, strip in strips.items()]
    return made, headings


def _strip(video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "h W 3"]:
    """A few frames side by side."""
    chosen = np.unique(np.linspace(0, len(video) - 1, FRAMES).round().astype(int))
    return np.concatenate(list(video[chosen]), axis=1)
