"""Samples that the training never reads, side by side: given, target, drawn, and drawn without the canvas."""

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.samples import Sample
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.held_out import held_out, of_tasks
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.report import pictures
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.types import Params

PICTURES, VIDEOS = 8, 2  # samples of a task that are drawn


def sheets(painter: Painter, params: Params, asked: Asked) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """A sheet for every task of a run, with a row for each sample. Of videos it shows the middle frame.

    The two drawings of a row begin with the same noise. ``asked.limit`` bounds the rows. Raises UserError where no
    samples are held out.
    """
    setup, found = painter.setup, {}
    for task, bucket in of_tasks(setup).items():
        records = held_out(setup, bucket)
        most = PICTURES if bucket.frames == 1 else VIDEOS
        count = min(most if asked.limit is None else min(most, asked.limit), len(records))
        examples = painter.inputs.examples(bucket)
        samples = [examples.fitted(records[i]) for i in range(count)]
        seed = setup.eval.seed if asked.seed is None else asked.seed
        columns = {}
        for label, canvas in (("drawn", True), ("without canvas", False)):
            if not canvas or (setup.canvas is not None and asked.canvas):
                drawn = painter.paint(params, samples, bucket, seed=seed, guidance=asked.guidance, canvas=canvas)
                columns[label] = drawn.pixels
        found[task] = _sheet(samples, bucket, columns)
    return found


def _sheet(
    samples: list[Sample], bucket: Bucket, columns: dict[str, UInt8[np.ndarray, "n t h w 3"]]
) -> UInt8[np.ndarray, "h w 3"]:
    """One row per sample; the prompt stands below its target."""
    shown, labels, width = [], [], 0
    for number, sample in enumerate(samples):
        parts = {"source": sample.source, "first frame": sample.target[:1], "references": sample.references[:1]}
        given = TASKS[bucket.task].vae
        row = {given: parts[given]} if given in parts else {}
        row |= {f"target: {sample.prompt}": sample.target}
        row |= {label: pixels[number] for label, pixels in columns.items()}
        shown += [video[len(video) // 2] for video in row.values()]
        labels += list(row)
        width = len(row)
    return pictures.grid(shown, labels, columns=width)
