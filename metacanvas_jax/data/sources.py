"""Opens the sources of samples that a config names, one section of it per source."""

import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.config.sources import DRAWN, SourceSection
from metacanvas_jax.data.formats.array_records import ArrayRecords
from metacanvas_jax.data.formats.drawn import Drawn
from metacanvas_jax.data.formats.emoji import Clips, Styles
from metacanvas_jax.data.formats.folders import CsvRows, Files, JsonLines
from metacanvas_jax.data.formats.manifest import RECIPE, read_recipe
from metacanvas_jax.data.formats.parquet import Parquet
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.formats.shards import FORMAT, WRITE_ALL, Compute, WriteConfig, write
from metacanvas_jax.data.formats.tars import WebDataset
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import STORED, VIDEO, Layout
from metacanvas_jax.data.transforms import AS_FOUND, Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.seals import json_hash
from metacanvas_jax.worlds.scenes import SceneWorld


def open_source(section: SourceSection, clip: Clip = AS_FOUND, world: SceneWorld | None = None) -> Guarded:
    """The samples of a source in the shape of a clip; ``world`` is that of drawings.

    With ``section.latents`` targets have their first frame only.

    Raises UserError when the source is not there, is damaged as a whole, or has no samples.
    """
    layout = Layout(section.task, dict(section.columns), clip, section.limits, first_frame=section.latents)
    stored = section.kind in DRAWN and section.path  # drawings that `prepare` wrote are records
    source = OPENERS["records" if stored else section.kind](section, layout, world)
    if len(source) == 0:
        raise UserError(f"{section.path}: no samples of kind {section.kind!r} there")
    return source


Opener = Callable[[SourceSection, Layout, SceneWorld | None], Guarded]


def _of_path(reader: Callable[..., Guarded]) -> Opener:
    """Formats that need nothing but a path."""
    return lambda section, layout, world: reader(files.folder(section.path), layout, **_guard(section))


def _records(section: SourceSection, layout: Layout, world: SceneWorld | None) -> Guarded:
    layout = dataclasses.replace(layout, columns=STORED | layout.columns)
    return Records(section.path, layout=layout, **_guard(section))


def _tfds(section: SourceSection, layout: Layout, world: SceneWorld | None) -> Guarded:
    return ArrayRecords(section.path, layout, section.split, **_guard(section))


def _webdataset(section: SourceSection, layout: Layout, world: SceneWorld | None) -> Guarded:
    return WebDataset(_files(section.path, "*.tar"), layout, section.cache, **_guard(section))


def _parquet(section: SourceSection, layout: Layout, world: SceneWorld | None) -> Guarded:
    return Parquet(_files(section.path, "*.parquet"), layout, **_guard(section))


def _drawn(section: SourceSection, layout: Layout, world: SceneWorld | None) -> Guarded:
    if world is None:
        raise UserError(f"a source of kind {section.kind!r} needs a world")
    return Drawn(section.kind, world, section.count, section.seed, layout, **_guard(section))


def _guard(section: SourceSection) -> dict[str, Any]:
    return {"max_skips": section.max_skips, "in_memory": section.in_memory}


OPENERS: dict[str, Opener] = {
    "records": _records,
    "tfds": _tfds,
    "webdataset": _webdataset,
    "jsonl": _of_path(JsonLines),
    "csv": _of_path(CsvRows),
    "files": _of_path(Files),
    "parquet": _parquet,
    "emoji_styles": _of_path(Styles),
    "emoji_clips": _of_path(Clips),
    **dict.fromkeys(DRAWN, _drawn),
}
"""How a source of each kind is opened. A new format is a module of ``formats/`` and a line here and in ``Kind``."""


def prepare(
    section: SourceSection,
    folder: str | os.PathLike,
    clip: Clip = AS_FOUND,
    config: WriteConfig = WRITE_ALL,
    world: SceneWorld | None = None,
    *,
    order: Sequence[int] | None = None,
    compute: Compute | None = None,
    computed: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """Turn a source into a folder of array_record shards, which is then a source of kind "records".

    ``order`` gives the numbers of the records to write (all by default). ``computed`` identifies what ``compute`` adds
    to the samples. Returns the folder, or None while shards of other processes are missing. Raises UserError as
    `open_source` and `shards.write` do.
    """
    source = open_given(section, clip, world)
    recipe = recipe_of(section, clip, config, world, len(source), computed)
    if order is not None:
        recipe["order"] = json_hash(list(order))
    if config.first_frame and section.task in VIDEO:
        there, needed = files.folder(folder), recipe | {"frames": "first"}
        if (there / RECIPE).is_file() and read_recipe(there) in json.loads(json.dumps([recipe, needed])):
            return there  # it holds every frame, as older folders do, at least of the sources, and serves as well
        kept = {"source_frames": list(config.source_frames)} if section.task == "video_editing" else {}
        recipe = needed | (kept if config.source_frames else {})
    return write(folder, recipe, source, config, order=order, compute=compute)


def open_given(section: SourceSection, clip: Clip, world: SceneWorld | None) -> Guarded:
    """The samples that are to be written: of drawings new ones, as they are not at their path yet."""
    return open_source(dataclasses.replace(section, path="") if section.kind in DRAWN else section, clip, world)


def recipe_of(
    section: SourceSection,
    clip: Clip,
    config: WriteConfig,
    world: SceneWorld | None,
    count: int,
    computed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the ``count`` records of a source in the shape of a clip are made from."""
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "kind": section.kind,
        "task": section.task,
        "split": section.split,
        "columns": dict(section.columns),
        "clip": dataclasses.asdict(clip),
        "jpeg": config.jpeg,
        "computed": dict(computed or {}),
        "count": count,
    }
    if section.kind in DRAWN:
        return recipe | {"seed": section.seed, "world": dataclasses.asdict(world) if world else None}
    return recipe | {"path": files.absolute(section.path)}


def _files(path: str, pattern: str) -> list[pathlib.Path]:
    """The files that a path, a pattern or a folder names, in order."""
    place = files.folder(path)
    if place.is_dir():
        found = files.matching(files.join(glob.escape(path), pattern))
    elif place.exists():  # whatever its name means to glob
        found = [place]
    else:
        found = files.matching(path)
    if not found:
        raise UserError(f"{path}: no {pattern} there")
    return found
