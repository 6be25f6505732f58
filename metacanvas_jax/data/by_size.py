"""Sources that `metacanvas prepare --by-bucket` sorted by the aspect ratio of their pictures.

Such a source is one folder of records per size, ``ROWSxCOLUMNS``, and ``sizes.json``, which says how many samples each
size has and what its shards hold. A bucket reads the folder of its own size. How often a bucket is drawn follows from
the numbers of samples. They are read from ``sizes.json``, so that all hosts agree, and are part of what a checkpoint
must agree with.
"""

import dataclasses
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

from metacanvas_jax import files, seals
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.formats import manifest
from metacanvas_jax.data.formats.manifest import RECIPE
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import Bucket

SIZES = "sizes.json"
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Sorted:
    """What a sorted folder holds: by (rows, columns) the number of samples, and a hash of the shards ("" for none).

    ``recipe`` is what it was made from, ``bad`` are the names of the records that were left out.
    """

    samples: Mapping[Size, int]
    content: Mapping[Size, str]
    recipe: Mapping[str, Any]
    bad: tuple[str, ...]

    def there(self) -> str:
        """The sizes that have samples, and how many."""
        return ", ".join(f"{name(size)} ({count:,})" for size, count in self.samples.items() if count)


def name(size: Size) -> str:
    """The name of the folder of a size."""
    return f"{size[0]}x{size[1]}"


def read(path: str | os.PathLike) -> Sorted:
    """What a sorted folder holds. Raises UserError where there is none, or its ``sizes.json`` is damaged."""
    place = files.folder(path) / SIZES
    if not place.exists():
        raise UserError(
            f"{path}: no {SIZES} there; a source with by_size is a folder that `metacanvas prepare --by-bucket` wrote "
            "and completed"
        )
    values = seals.opened(files.read_json(place), place)
    try:
        rows = {(int(row["size"][0]), int(row["size"][1])): row for row in values["sizes"]}
        return Sorted(
            {size: int(row["samples"]) for size, row in rows.items()},
            {size: str(row["content"]) for size, row in rows.items()},
            dict(values["recipe"]),
            tuple(str(one) for one in values["bad"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{place}: no list of sizes of `metacanvas prepare --by-bucket` ({error})") from error


def verify(path: str | os.PathLike) -> Sorted:
    """What a sorted folder holds, after comparing the shards of every size with their hashes.

    Raises UserError naming the first file that differs.
    """
    found = read(path)
    for size, count in found.samples.items():
        if count:
            manifest.verify(files.join(os.fspath(path), name(size)))
            _check(path, size, found)
    return found


def at(experiment: Experiment, bucket: Bucket) -> list[SourceSection]:
    """The sources of a bucket's task, each with the path and the weight that it has in this bucket.

    Of sources that are sorted by size these are the folders of the bucket's size; a source without samples of that size
    is left out. The weight of a folder is that of its source times its share of the source's samples. Other sources are
    as the config has them.

    Raises UserError for a size that a sorted source does not have.
    """
    sections = [section for section in experiment.sources if section.task == bucket.task]
    sizes = [one.size for one in experiment.shapes if one.task == bucket.task]
    found = []
    for section in sections:
        if not section.by_size:
            found.append(section)
            continue
        there = read(section.path)
        folder = files.join(section.path, name(bucket.size))
        count = there.samples.get(bucket.size)
        if count is None or (count and not (files.folder(folder) / RECIPE).is_file()):
            left = {size: n for size, n in there.samples.items() if (_folder(section, size) / RECIPE).is_file()}
            left = dataclasses.replace(there, samples=left)
            raise UserError(
                f"{section.path}: no folder {name(bucket.size)}, which the bucket of {bucket.size[0]} x "
                f"{bucket.size[1]} pixels reads; there are {left.there()}; sort the samples for this "
                "config by `metacanvas prepare --by-bucket`"
            )
        if count:
            share = count / sum(there.samples.get(size, 0) for size in {*sizes, bucket.size})
            found.append(dataclasses.replace(section, path=folder, weight=section.weight * share, by_size=False))
    return found


def buckets(experiment: Experiment) -> tuple[Bucket, ...]:
    """The buckets of a run with the weights by which steps draw them.

    The buckets of a task whose sources are sorted by size share the sum of their weights: each gets a part that is
    proportional to its own weight and to its number of samples, divided by its batch, so that with equal weights all
    samples of a source are seen equally often. All others have the weight of the config, and no file is read.

    Raises UserError for a size that a sorted source does not have, and where no bucket of a task has samples.
    """
    shapes = list(experiment.shapes)
    for task in _tasks(experiment):
        group = [number for number, bucket in enumerate(shapes) if bucket.task == task]
        whole = sum(shapes[number].weight for number in group)
        samples = {number: sum(section.weight for section in at(experiment, shapes[number])) for number in group}
        parts = {number: shapes[number].weight * share / shapes[number].batch for number, share in samples.items()}
        if whole and not sum(parts.values()):
            raise UserError(f"config: no bucket of {task} with a weight above zero has samples of its size")
        for number, part in parts.items():
            shapes[number] = dataclasses.replace(shapes[number], weight=whole and whole * part / sum(parts.values()))
    return tuple(shapes)


def looked_at(experiment: Experiment) -> list[Bucket]:
    """The buckets that previews and evaluators draw: all, but of a task that is sorted by size the one drawn most."""
    drawn = buckets(experiment)
    most = {
        task: max((one for one in drawn if one.task == task), key=operator.attrgetter("weight"))
        for task in _tasks(experiment)
    }
    return [bucket for bucket in drawn if most.get(bucket.task, bucket) is bucket]


def said(experiment: Experiment) -> list[str]:
    """Lines about sizes without samples and about samples that no bucket of the run reads; [] where nothing is sorted.

    Raises UserError for a source whose folders are not those that its ``sizes.json`` names.
    """
    lines = []
    for task in _tasks(experiment):
        sizes = experiment.sizes_of(task)
        sections = [section for section in experiment.sources if section.by_size and section.task == task]
        found = {section.path: read(section.path) for section in sections}
        for path, there in found.items():
            rest = {size: count for size, count in there.samples.items() if count and size not in sizes}
            if rest:
                listed = ", ".join(f"{name(size)} ({count:,})" for size, count in rest.items())
                lines.append(f"{path}: samples of sizes that no bucket of {task} has are not read: {listed}")
        empty = [name(size) for size in sizes if not any(there.samples.get(size) for there in found.values())]
        if empty:
            lines.append(f"{task}: no sample is nearest to {', '.join(empty)}; these buckets are never drawn")
    return lines


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a run that continues must find again in its sorted sources, by source; {} where there are none.

    Raises UserError for a source that is not there, or whose folders are not those that its ``sizes.json`` names.
    """
    found = {}
    for number, section in enumerate(experiment.sources):
        if section.by_size:
            there = read(section.path)
            for size in experiment.sizes_of(section.task):
                _check(section.path, size, there)
            found[f"{SIZES} of sources[{number}]"] = [
                f"{name(size)}: {count} samples, {there.content[size][:12] or 'none'}"
                for size, count in sorted(there.samples.items())
            ]
    return found


def _folder(section: SourceSection, size: Size) -> files.Path:
    return files.folder(files.join(section.path, name(size)))


def _check(path: str | os.PathLike, size: Size, there: Sorted) -> None:
    """Raises UserError where a folder holds other samples than its ``sizes.json`` says. Reads its manifest alone."""
    if not there.samples.get(size):
        return
    folder = files.join(os.fspath(path), name(size))
    if not (files.folder(folder) / RECIPE).is_file():
        return  # `at` tells what there is
    count, content = manifest.content(folder)
    if (count, content) != (there.samples[size], there.content[size]):
        raise UserError(
            f"{folder}: these {count:,} samples are not the {there.samples[size]:,} that {SIZES} names; delete "
            f"{os.fspath(path)} and sort them again"
        )


def _tasks(experiment: Experiment) -> Sequence[str]:
    """The tasks whose sources are sorted by size, in their order."""
    return list(dict.fromkeys(section.task for section in experiment.sources if section.by_size))
