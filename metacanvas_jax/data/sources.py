"""Where samples come from: one section of a config per source, and one function that opens it."""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from metacanvas_jax.data.decoding import LIMITS, Limits
from metacanvas_jax.data.formats.array_records import ArrayRecords
from metacanvas_jax.data.formats.drawn import Drawn
from metacanvas_jax.data.formats.emoji import SERVES, Clips, Styles
from metacanvas_jax.data.formats.folders import Files, JsonLines
from metacanvas_jax.data.formats.parquet import Parquet
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.formats.shards import FORMAT, WRITE_ALL, Compute, WriteConfig, write
from metacanvas_jax.data.formats.tars import WebDataset
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import NAMES, STORED, Layout
from metacanvas_jax.data.samples import TASKS
from metacanvas_jax.data.transforms import AS_FOUND, Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds.scenes import SceneWorld

Kind = Literal[
    "records",
    "tfds",
    "webdataset",
    "jsonl",
    "files",
    "parquet",
    "emoji_styles",
    "emoji_clips",
    "scenes",
    "edits",
    "animations",
]


@dataclasses.dataclass(frozen=True)
class SourceSection:
    """One source of samples.

    ``kind`` is the layout of ``path``: "records" (what `metacanvas prepare` writes), "tfds" (any TFDS folder of
    array_records), "webdataset" (tars), "jsonl" (media and a file of rows), "files" (``CLIP.mp4`` + ``CLIP.txt``) and
    "parquet"; tars and parquet files may be given by a pattern such as ``shards/*.tar``. "emoji_styles" and
    "emoji_clips" are npm packages below ``path``. "scenes", "edits" and "animations" are OpenMoji drawings with exact
    ground truth, drawn when they are read or, where ``path`` is given, once and there by `metacanvas prepare`.

    ``task`` is what the samples serve for, ``weight`` their share among the sources of that task. ``columns`` are
    (part of a sample, its name in the source) where the usual names do not apply. ``max_skips`` bad records are passed
    over before a run stops; ``limits`` bound what one medium may hold. ``count`` and ``seed`` are those of drawings.
    ``latents`` trains on those that `metacanvas prepare --latents` stored beside the samples.
    """

    kind: Kind
    path: str = ""
    task: str = "text_to_image"
    weight: float = 1.0
    split: str = "train"
    columns: tuple[tuple[str, str], ...] = ()
    max_skips: int = 0
    in_memory: bool = False
    cache: str = ""
    limits: Limits = LIMITS
    count: int = 10_000
    seed: int = 0
    latents: bool = False

    def __post_init__(self) -> None:
        drawn = self.kind in DRAWN
        if not drawn and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        served = (DRAWN | SERVES).get(self.kind, TASKS)
        if self.task not in served:
            raise ValueError(f"{self.kind} serve for {', '.join(served)}, not for {self.task}")
        if self.weight < 0 or self.max_skips < 0:
            raise ValueError(f"weight {self.weight} and max_skips {self.max_skips} must not be negative")
        if self.latents and not (self.path and (drawn or self.kind == "records")):
            raise ValueError(f"latents are in records of `metacanvas prepare`, not in a source of kind {self.kind!r}")
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1")
        for part, _ in self.columns:
            if part not in NAMES:
                raise ValueError(f"columns: {part!r} is no part of a sample; these are {', '.join(NAMES)}")


DRAWN: dict[str, tuple[str, ...]] = {
    "scenes": ("text_to_image", "reconstruction"),
    "edits": ("image_editing",),
    "animations": ("text_to_video", "image_to_video", "video_editing", "reference_to_video"),
}
"""The tasks that drawings serve for, by kind."""


def open_source(section: SourceSection, clip: Clip = AS_FOUND, world: SceneWorld | None = None) -> Guarded:
    """The samples of a source in the shape of a clip; ``world`` is that of drawings.

    Where a section wants stored latents, targets have their first frame only.

    Raises UserError when the source is not there, is damaged as a whole, or has no samples.
    """
    layout = Layout(section.task, dict(section.columns), clip, section.limits, first_frame=section.latents)
    options = {"max_skips": section.max_skips, "in_memory": section.in_memory}
    if section.kind in DRAWN and not section.path:
        if world is None:
            raise UserError(f"a source of kind {section.kind!r} needs a world")
        source: Guarded = Drawn(section.kind, world, section.count, section.seed, layout, **options)
    elif section.kind in DRAWN or section.kind == "records":
        layout = dataclasses.replace(layout, columns=STORED | layout.columns)
        source = Records(section.path, layout=layout, **options)
    elif section.kind == "tfds":
        source = ArrayRecords(section.path, layout, section.split, **options)
    elif section.kind == "webdataset":
        source = WebDataset(_files(section.path, "*.tar"), layout, section.cache, **options)
    elif section.kind == "parquet":
        source = Parquet(_files(section.path, "*.parquet"), layout, **options)
    elif section.kind == "jsonl":
        source = JsonLines(pathlib.Path(section.path), layout, **options)
    elif section.kind in SERVES:
        of_kind = Styles if section.kind == "emoji_styles" else Clips
        source = of_kind(pathlib.Path(section.path), layout, **options)
    else:
        source = Files(pathlib.Path(section.path), layout, **options)
    if len(source) == 0:
        raise UserError(f"{section.path}: no samples of kind {section.kind!r} there")
    return source


def prepare(
    section: SourceSection,
    folder: str | os.PathLike,
    clip: Clip = AS_FOUND,
    config: WriteConfig = WRITE_ALL,
    world: SceneWorld | None = None,
    *,
    compute: Compute | None = None,
    computed: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """Turn a source into a folder of array_record shards, which is then a source of kind "records".

    ``computed`` identifies what ``compute`` adds to the samples. Returns the folder, or None while shards of other
    processes are missing. Raises UserError as `open_source` and `shards.write` do.
    """
    drawn = section.kind in DRAWN
    source = open_source(dataclasses.replace(section, path="") if drawn else section, clip, world)
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "kind": section.kind,
        "task": section.task,
        "split": section.split,
        "columns": dict(section.columns),
        "clip": dataclasses.asdict(clip),
        "jpeg": config.jpeg,
        "computed": dict(computed or {}),
        "count": len(source),
    }
    if drawn:
        recipe |= {"seed": section.seed, "world": dataclasses.asdict(world) if world else None}
    else:
        recipe["path"] = str(pathlib.Path(section.path).absolute())
    return write(folder, recipe, source, config, compute=compute)


def _files(path: str, pattern: str) -> list[pathlib.Path]:
    """The files that a path, a pattern or a folder names, in order."""
    if pathlib.Path(path).is_dir():
        found = sorted(glob.glob(os.path.join(glob.escape(path), pattern)))
    elif pathlib.Path(path).exists():  # whatever its name means to glob
        found = [path]
    else:
        found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise UserError(f"{path}: no {pattern} there")
    return [pathlib.Path(name) for name in found]
