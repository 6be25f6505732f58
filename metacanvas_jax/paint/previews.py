"""What training shows of its progress on every task: what was given, what was wanted, what was painted."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.inputs import Inputs, sources_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.tasks import TASKS, Bucket

SAMPLES, FRAMES = 4, 3  # of a task, and of a video (first, middle, last)


def samples_of(inputs: Inputs, bucket: Bucket) -> list[Sample]:
    """The first samples of a bucket's first source. Raises UserError when it is not there."""
    records, examples = sources_of(inputs.experiment, bucket)[0].records, inputs.examples(bucket)
    return [examples.fitted(records[i]) for i in range(min(SAMPLES, len(records)))]


def strips(
    samples: Sequence[Sample], painted: UInt8[np.ndarray, "n t h w 3"], bucket: Bucket
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """One picture per sample, from left to right: what the DiT was given, the target, what was painted."""
    made = []
    for sample, pixels in zip(samples, painted, strict=True):
        parts = {"source": sample.source, "first frame": sample.target[:1], "references": sample.references}
        given = parts.get(TASKS[bucket.task].vae)
        rows = [np.stack(list(given))] if given is not None else []
        made.append(np.concatenate([_strip(video) for video in (*rows, sample.target, pixels)], axis=1))
    return made


def _strip(video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "h W 3"]:
    """A few frames side by side."""
    chosen = np.unique(np.linspace(0, len(video) - 1, FRAMES).round().astype(int))
    return np.concatenate(list(video[chosen]), axis=1)
