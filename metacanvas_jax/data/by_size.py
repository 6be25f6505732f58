"""Sources that `metacanvas prepare --by-bucket` sorted by the aspect ratio of their pictures.

Such a source is one folder of records per size, ``ROWSxCOLUMNS``, and ``sizes.json``, which says how many samples each
size has and what its shards hold. Where a size has buckets of several lengths of prompts (``Bucket.by_length``), it has
a folder for each: ``ROWSxCOLUMNS-TOKENS``. A bucket reads the folder of its own size and length; one without
``by_length`` reads all folders of its size. How often a bucket is drawn follows from the numbers of samples. They are
read from ``sizes.json``, so that all hosts agree, and are part of what a checkpoint must agree with.
"""

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metacanvas_jax import files, seals
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.formats import manifest
from metacanvas_jax.data.formats.manifest import RECIPE
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import Bucket, SortKey, any_length

SIZES = "sizes.json"


@dataclasses.dataclass(frozen=True)
class Sorted:
    """What a sorted folder holds: by size and length the number of samples, and a hash of the shards ("" for none).

    ``recipe`` is what it was made from, ``bad`` are the names of the records that were left out.
    """

    samples: Mapping[SortKey, int]
    content: Mapping[SortKey, str]
    recipe: Mapping[str, Any]
    bad: tuple[str, ...]

    def there(self) -> str:
        """The folders that have samples, and how many."""
        return ", ".join(f"{key.name} ({count:,})" for key, count in self.samples.items() if count)

    def read_by(self, keys: Iterable[SortKey]) -> list[SortKey]:
        """The folders that buckets of some keys read, with and without samples."""
        asked = list(keys)
        return [key for key in self.samples if any(one.holds(key) for one in asked)]


def row(key: SortKey) -> dict[str, Any]:
    """The row of a folder without samples in ``sizes.json``."""
    length = {"length": key.length} if key.length else {}
    return {"size": key.size, **length, "samples": 0, "content": ""}


def _key(row: Mapping[str, Any]) -> SortKey:
    return SortKey((int(row["size"][0]), int(row["size"][1])), int(row.get("length", 0)))


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
        rows = {_key(row): row for row in values["sizes"]}
        return Sorted(
            {key: int(row["samples"]) for key, row in rows.items()},
            {key: str(row["content"]) for key, row in rows.items()},
            dict(values["recipe"]),
            tuple(str(one) for one in values["bad"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{place}: no list of sizes of `metacanvas prepare --by-bucket` ({error})") from error


def verify(path: str | os.PathLike) -> Sorted:
    """What a sorted folder holds, after comparing all shards with their hashes.

    Raises UserError naming the first file that differs.
    """
    found = read(path)
    for key, count in found.samples.items():
        if count:
            manifest.verify(files.join(os.fspath(path), key.name))
            _check(path, key, found)
    return found


def at(experiment: Experiment, bucket: Bucket) -> list[SourceSection]:
    """The sources of a bucket's task, each with the path and the weight that it has in this bucket.

    Of sources that are sorted these are the folders of the bucket's key; a source without samples there is left out.
    The weight of a folder is that of its source times its share of the source's samples. Other sources are as the
    config has them.

    Raises UserError for a size, or a length of it, that a sorted source does not have.
    """
    sections = [section for section in experiment.sources if section.task == bucket.task]
    found = []
    for section in sections:
        if not section.by_size:
            found.append(section)
            continue
        there = read(section.path)
        own = there.read_by([bucket.key])
        if gone := [key for key in own or [bucket.key] if not _is_there(section.path, key, there)]:
            left = {key: count for key, count in there.samples.items() if _is_there(section.path, key, there)}
            left = dataclasses.replace(there, samples=left)
            raise UserError(
                f"{section.path}: no folder {gone[0].name}, which the bucket of {bucket.key.words} reads; there are "
                f"{left.there()}; sort the samples for this config by `metacanvas prepare --by-bucket`"
            )
        whole = sum(there.samples[key] for key in there.read_by([*_keys(experiment, bucket.task), bucket.key]))
        for key in own:
            if count := there.samples[key]:
                share, folder = count / whole, files.join(section.path, key.name)
                found.append(dataclasses.replace(section, path=folder, weight=section.weight * share, by_size=False))
    return found


def buckets(experiment: Experiment) -> tuple[Bucket, ...]:
    """The buckets of a run with the weights by which steps draw them.

    The buckets of a task whose sources are sorted by size share the sum of their weights: each gets a part that is
    proportional to its own weight and to its number of samples, divided by its batch, so that with equal weights all
    samples of a source are seen equally often. All others have the weight of the config, and no file is read.

    Raises UserError for a size or length that a sorted source does not have, and where no bucket of a task has samples.
    """
    shapes = list(experiment.shapes)
    for task in _tasks(experiment):
        group = [number for number, bucket in enumerate(shapes) if bucket.task == task]
        whole = sum(shapes[number].weight for number in group)
        samples = {number: sum(section.weight for section in at(experiment, shapes[number])) for number in group}
        parts = {number: shapes[number].weight * share / shapes[number].batch for number, share in samples.items()}
        if whole and not sum(parts.values()):
            raise UserError(f"config: no bucket of {task} with a weight above zero has samples in its folder")
        for number, part in parts.items():
            shapes[number] = dataclasses.replace(shapes[number], weight=whole and whole * part / sum(parts.values()))
    return tuple(shapes)


def looked_at(experiment: Experiment) -> list[Bucket]:
    """The buckets that previews and evaluators draw: all, but of a task that is sorted by size the size drawn most.

    They are for prompts of any length: of buckets that differ in length alone it is the longest, with samples of all.
    """
    drawn = any_length(buckets(experiment))
    most = {
        task: max((one for one in drawn if one.task == task), key=operator.attrgetter("weight"))
        for task in _tasks(experiment)
    }
    return [bucket for bucket in drawn if most.get(bucket.task, bucket) is bucket]


def said(experiment: Experiment) -> list[str]:
    """Lines about buckets without samples and about samples that no bucket reads; [] where nothing is sorted.

    Raises UserError for a source whose folders are not those that its ``sizes.json`` names.
    """
    lines = []
    for task in _tasks(experiment):
        keys = _keys(experiment, task)
        sections = [section for section in experiment.sources if section.by_size and section.task == task]
        found = {section.path: read(section.path) for section in sections}
        for path, there in found.items():
            rest = {key: count for key, count in there.samples.items() if count and key not in there.read_by(keys)}
            if rest:
                listed = ", ".join(f"{key.name} ({count:,})" for key, count in rest.items())
                lines.append(f"{path}: samples that belong to no bucket of {task} are not read: {listed}")
        with_samples = [key for there in found.values() for key, count in there.samples.items() if count]
        empty = [key.name for key in keys if not any(key.holds(one) for one in with_samples)]
        if empty:
            lines.append(f"{task}: no sample belongs to {', '.join(empty)}; these buckets are never drawn")
    return lines


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a run that continues must find again in its sorted sources, by source; {} where there are none.

    Raises UserError for a source that is not there, or whose folders are not those that its ``sizes.json`` names.
    """
    found = {}
    for number, section in enumerate(experiment.sources):
        if section.by_size:
            there = read(section.path)
            for key in there.read_by(_keys(experiment, section.task)):
                _check(section.path, key, there)
            found[f"{SIZES} of sources[{number}]"] = [
                f"{key.name}: {count} samples, {there.content[key][:12] or 'none'}"
                for key, count in sorted(there.samples.items())
            ]
    return found


def _keys(experiment: Experiment, task: str) -> list[SortKey]:
    """The keys of the buckets of a task."""
    return [bucket.key for bucket in experiment.shapes if bucket.task == task]


def _is_there(path: str, key: SortKey, there: Sorted) -> bool:
    """Whether a folder that ``sizes.json`` names is there, or has no samples."""
    count = there.samples.get(key)
    return count is not None and (not count or (files.folder(files.join(path, key.name)) / RECIPE).is_file())


def _check(path: str | os.PathLike, key: SortKey, there: Sorted) -> None:
    """Raises UserError where a folder holds other samples than its ``sizes.json`` says. Reads its manifest alone."""
    if not there.samples.get(key):
        return
    folder = files.join(os.fspath(path), key.name)
    if not (files.folder(folder) / RECIPE).is_file():
        return  # `at` tells what there is
    count, content = manifest.content(folder)
    if (count, content) != (there.samples[key], there.content[key]):
        raise UserError(
            f"{folder}: these {count:,} samples are not the {there.samples[key]:,} that {SIZES} names; delete "
            f"{os.fspath(path)} and sort them again"
        )


def _tasks(experiment: Experiment) -> Sequence[str]:
    """The tasks whose sources are sorted by size, in their order."""
    return list(dict.fromkeys(section.task for section in experiment.sources if section.by_size))
