"""Sorting a source by size and length of prompts: `metacanvas prepare --by-bucket` (read by `by_size.py`).

The first pass decodes every sample as it is found and notes where it belongs: to the nearest size and, where buckets of
that size differ in length, to the shortest length that its prompt fits. The second writes one folder of records for
each. Both go on where they were stopped, and any number of processes share them without waiting for each other: a
process that is through with its own part of the first pass takes over what others have not done yet.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from metacanvas_jax import files, seals
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import by_size
from metacanvas_jax.data.by_size import SIZES
from metacanvas_jax.data.formats import manifest
from metacanvas_jax.data.formats.shards import WRITE_ALL, Compute, WriteConfig, write_text
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.lengths import Lengths
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.sources import open_given, prepare, recipe_of
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.sizes import nearest_size
from metacanvas_jax.tasks import Bucket, overlapping
from metacanvas_jax.worlds.scenes import SceneWorld

UNFINISHED = "unfinished.json"
NOTED = "nearest"  # folder of what the first pass found
PART = 1024  # records that are looked at before it is noted where they belong
BAD = -1  # in place of the number of a bucket

Place = Callable[[Sample], int]
"""The number of the bucket that a sample belongs to."""


def chosen(buckets: Sequence[Bucket], task: str) -> list[Bucket]:
    """The buckets of a task, by size and length.

    Raises UserError where there is no such bucket, two have one size and length, or they differ in frames or rate.
    """
    found = [bucket for bucket in buckets if bucket.task == task]
    if not found:
        others = ", ".join(sorted({bucket.task for bucket in buckets}))
        raise UserError(f"--by-bucket --task {task}: the config has no bucket of this task, it has {others}")
    clips = [clip_of(one) for one in found]
    if overlapping(found) is not None or len({(clip.frames, clip.fps) for clip in clips}) > 1:
        raise UserError(
            f"--by-bucket --task {task}: the config's buckets of this task must have different sizes or, with "
            "by_length=True, different lengths, and the same frames and fps"
        )
    return sorted(found, key=lambda bucket: bucket.key)


def placing(buckets: Sequence[Bucket], lengths: Lengths | None) -> Place:
    """Where samples as they are found belong among `chosen` buckets.

    It is the bucket of the nearest size and, of several lengths, the shortest that the prompt fits, media included: the
    longest for a prompt that fits none.
    """
    sizes = [bucket.size for bucket in buckets]

    def of(sample: Sample) -> int:
        rows, columns = sample.image.shape[:2]
        size = nearest_size((rows, columns), sizes)
        numbers = [number for number, bucket in enumerate(buckets) if bucket.size == size]
        if lengths is None or len(numbers) == 1:
            return numbers[-1]
        needed = lengths.of(sample.prompt, size)
        return next((number for number in numbers if buckets[number].length >= needed), numbers[-1])

    return of


def sort(
    section: SourceSection,
    folder: str | os.PathLike,
    buckets: Sequence[Bucket],
    config: WriteConfig = WRITE_ALL,
    world: SceneWorld | None = None,
    *,
    lengths: Lengths | None = None,
    compute: Compute | None = None,
    computed: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """Writes a source into one folder of records per bucket; each sample goes to one of them (`placing`).

    ``buckets`` are those that `chosen` returns; ``lengths`` measures prompts where some differ in length. A folder that
    already holds exactly this is left as it is. Returns the folder, or None while shards of other processes are
    missing. Bad records are left out, up to the source's ``max_skips``; their names lie in ``sizes.json``.

    Raises UserError when the folder holds anything else, too many records are bad, or as `sources.prepare` does.
    """
    folder = files.folder(folder)
    keys, shapes = [bucket.key for bucket in buckets], [clip_of(bucket) for bucket in buckets]
    found = dataclasses.replace(shapes[0], size=None)
    source = open_given(section, found, world)
    recipe = recipe_of(section, found, config, world, len(source), computed)
    recipe |= {"sizes": [key.size for key in keys]}
    recipe |= {"first_frame": config.first_frame, "source_frames": list(config.source_frames)}
    if any(key.length for key in keys):
        if lengths is None:
            raise ValueError("buckets that differ in length need lengths, which measures prompts")
        recipe |= {"lengths": [key.length for key in keys], "prompts": lengths.identity()}
    recipe = json.loads(json.dumps(recipe))
    if (folder / SIZES).exists():
        _same(folder, recipe, by_size.read(folder).recipe, "another sorted source")
        return folder
    _begin(folder, recipe)
    near, bad = _looked_at(source, folder, placing(buckets, lengths), config)
    _allowed(source, bad)
    orders = [[index for index, nearest in enumerate(near) if nearest == number] for number in range(len(keys))]
    places = {number: folder / keys[number].name for number, order in enumerate(orders) if order}

    def missing(numbers: Iterable[int]) -> list[int]:
        """Writes this process's part of some buckets; returns those that are not complete."""
        how = {"compute": compute, "computed": computed}
        return [
            k for k in numbers if prepare(section, places[k], shapes[k], config, world, order=orders[k], **how) is None
        ]

    if missing(missing(places)):  # the second time for what others have completed in the meantime
        return None
    rows = [by_size.row(key) for key in keys]
    for number, place in places.items():
        rows[number]["samples"], rows[number]["content"] = manifest.content(place)
        bad += manifest.skipped(place)
    _allowed(source, bad)
    write_text(folder / SIZES, json.dumps(seals.sealed({"recipe": recipe, "sizes": rows, "bad": bad}), indent=1))
    files.remove(folder / NOTED)
    files.remove(folder / UNFINISHED)
    return folder


def report(folder: str | os.PathLike) -> Iterator[str]:
    """What became of every sample of a sorted source, in lines."""
    found = by_size.read(folder)
    there = {key: count for key, count in found.samples.items() if count}
    yield f"{os.fspath(folder)}: {sum(there.values()):,} samples in {len(there)} of {len(found.samples)} buckets"
    yield from (f"  {key.name:>13} {count:>11,}" for key, count in there.items())
    if empty := [key.name for key in found.samples if key not in there]:
        yield f"no sample belongs to {', '.join(empty)}, which get no folder"
    if found.bad:
        yield f"{len(found.bad):,} bad records were left out, their names are in {SIZES}; the first is {found.bad[0]}"


def clip_of(bucket: Bucket) -> Clip:
    """The shape of a bucket's samples."""
    return Clip(bucket.size, bucket.frames, bucket.fps if bucket.frames > 1 else None)


def _begin(folder: pathlib.Path, recipe: dict[str, Any]) -> None:
    """Makes the folder, or checks that it is an unfinished one of the same recipe."""
    path = folder / UNFINISHED
    if path.exists():
        _same(folder, recipe, files.read_json(path), "an unfinished sorting of something else")
        return
    if files.listing(folder, deep=True):
        raise UserError(f"{folder} exists and is no sorted source; name another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(recipe, indent=1))


def _same(folder: pathlib.Path, recipe: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    different = [key for key in {**recipe, **found} if recipe.get(key) != found.get(key)]
    if different:
        raise UserError(
            f"{folder} holds {what} (it differs in {', '.join(different)}); name another folder or delete it"
        )


def _looked_at(source: Guarded, folder: pathlib.Path, where: Place, config: WriteConfig) -> tuple[list[int], list[str]]:
    """For every record the number of its bucket, or ``BAD``; and the names of the bad ones."""
    parts = [range(start, min(start + PART, len(source))) for start in range(0, len(source), PART)]
    paths = [folder / NOTED / f"{part.start:08d}-{part.stop:08d}.json" for part in parts]
    mine = range(config.process_index, len(parts), config.process_count)
    others = [k for k in reversed(range(len(parts))) if k not in mine]
    with tqdm(total=len(source), desc="looking at", unit=" samples", disable=not config.progress) as bar:
        for k in (*mine, *others):
            if not paths[k].exists():
                paths[k].parent.mkdir(parents=True, exist_ok=True)
                write_text(paths[k], json.dumps(_nearest(source, parts[k], where)))
            bar.update(len(parts[k]))
    noted = [files.read_json(path) for path in paths]
    return [number for one in noted for number in one["nearest"]], [name for one in noted for name in one["bad"]]


def _nearest(source: Guarded, part: Sequence[int], where: Place) -> dict[str, Any]:
    nearest, bad = [], []
    for index in part:
        sample = source.try_read(index)
        if sample is None:
            bad.append(source.name(index))
            nearest.append(BAD)
            continue
        try:
            nearest.append(where(sample))
        except UserError as error:  # a prompt that no run reads
            raise UserError(f"{source}: {source.name(index)}: {error}") from error
    return {"nearest": nearest, "bad": bad}


def _allowed(source: Guarded, bad: Sequence[str]) -> None:
    """Raises UserError where too many records are bad, or all."""
    if len(bad) > source.max_skips:
        raise UserError(f"{source}: {len(bad)} records are corrupt, {source.max_skips} allowed; the first is {bad[0]}")
    if len(bad) == len(source):
        raise UserError(f"{source}: no readable record")
