"""The samples that evaluate a run: those that its training never reads."""

import dataclasses
import itertools

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN, SourceSection
from metacanvas_jax.data import by_size, latents
from metacanvas_jax.data.inputs import sources_of
from metacanvas_jax.data.mixture import RandomAccess
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import Bucket

SEED = 1_000_003  # added to the seed of drawings
MOST = 1 << 16


class HeldOut:
    """Samples of some sources by turns, up to ``MOST``. The first ones are always the same.

    With ``stored`` they bring their latents.
    """

    def __init__(self, records: list[RandomAccess], stored: bool = False):
        self.stored = stored
        longest = max(len(source) for source in records)
        places = ((source, i) for i in range(longest) for source in records if i < len(source))
        self._places = list(itertools.islice(places, MOST))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        source, place = self._places[index]
        return source[place]


def of_tasks(setup: Experiment) -> dict[str, Bucket]:
    """The bucket that is scored for each task: the first, or where samples are sorted by size the one drawn most."""
    return dict(reversed({bucket.task: bucket for bucket in reversed(by_size.looked_at(setup))}.items()))


def check(setup: Experiment) -> None:
    """Raises UserError for a task of which no samples are kept out of the training; opens no source."""
    for bucket in setup.shapes:
        if not _validated(setup, bucket) and not _others(setup, bucket):
            raise UserError(
                f"no samples of {bucket.task} are kept out of the training: name some in eval.sources, or a share in "
                "sources[i].validation"
            )


def held_out(setup: Experiment, bucket: Bucket, *, as_trained: bool = False) -> HeldOut:
    """The samples of a bucket's task that the training does not read, in the bucket's shape.

    With ``as_trained`` they bring their latents where those of the training do. Else their videos are for looking at.

    Raises UserError where there are none, or their source is not there.
    """
    check(dataclasses.replace(setup, buckets=(bucket,)))
    validated = _validated(setup, bucket)
    stored = validated and as_trained and latents.stored(setup, bucket)
    other = setup if validated else dataclasses.replace(setup, sources=_others(setup, bucket))
    kept = sources_of(other, bucket, stored=stored, validation=validated)
    if not kept:
        raise UserError(f"no samples of {bucket.name} are kept out of the training: there are none of this size")
    return HeldOut([source.records for source in kept], stored)


def _validated(setup: Experiment, bucket: Bucket) -> bool:
    """Whether the training's own sources keep samples back, and the config names no others."""
    named = any(section.task == bucket.task for section in setup.eval.sources)
    return not named and any(section.task == bucket.task and section.validation for section in setup.sources)


def _others(setup: Experiment, bucket: Bucket) -> tuple[SourceSection, ...]:
    """Sources of samples that the training does not have: those that the config names, or drawings of another seed."""
    named = tuple(section for section in setup.eval.sources if section.task == bucket.task)
    if named or not setup.sources:
        return named or (SourceSection("scenes", task=bucket.task, seed=setup.seed + SEED),)
    drawn = [section for section in setup.sources if section.task == bucket.task and section.kind in DRAWN]
    return tuple(dataclasses.replace(section, path="", latents=False, seed=section.seed + SEED) for section in drawn)
