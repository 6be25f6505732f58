"""Samples on disk: written once as a TFDS array_record dataset (without TensorFlow), read at random.

A dataset folder is complete or absent: it is written under another name and renamed last. ``recipe.json`` in it says
what it was made from.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tensorflow_datasets.core.hashing import Hasher

from metacanvas_jax.data.formats import manifest, shards
from metacanvas_jax.data.formats.array_records import ArrayRecords
from metacanvas_jax.data.formats.drawn import Drawn
from metacanvas_jax.data.formats.manifest import read_recipe
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import STORED, Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import openmoji
from metacanvas_jax.worlds.scenes import Scene, SceneWorld

_PER_SHARD = 8192
AS_STORED = Layout(columns=STORED)


def prepare(
    out_dir: str | os.PathLike, world: SceneWorld, count: int, seed: int, progress: bool = True
) -> pathlib.Path:
    """Write ``count`` training scenes of a world; a folder that already holds exactly these is left as it is.

    An interrupted writing goes on where it stood. Raises UserError when the folder holds anything else.
    """
    if count < 1:
        raise UserError(f"a dataset needs at least one picture, asked for {count}")
    # Drawn before anything is written, so that missing packages leave no trace.
    source = Drawn("scenes", world, count, seed, Layout())
    recipe = {
        "format": shards.FORMAT,
        "kind": "openmoji scenes",
        "count": count,
        "seed": seed,
        "world": dataclasses.asdict(world),
    }
    return _write(out_dir, recipe, source, progress)


def prepare_pictures(
    out_dir: str | os.PathLike, size: int, count: int | None = None, progress: bool = True
) -> pathlib.Path:
    """Write OpenMoji pictures of ``size x size`` captioned by their names: all of them, or an even choice of ``count``.

    Raises UserError when the folder holds anything else, or there are fewer than ``count``.
    """
    names = openmoji.picture_names()
    count = len(names) if count is None else count
    if not 0 < count <= len(names):
        raise UserError(f"asked for {count} OpenMoji pictures, there are {len(names)}")
    recipe = {"format": shards.FORMAT, "kind": "openmoji pictures", "count": count, "size": size}
    return _write(out_dir, recipe, _Pictures(names, count, size), progress)


def _write(out_dir: str | os.PathLike, recipe: dict[str, Any], source: Guarded, progress: bool) -> pathlib.Path:
    """Writes a source in TFDS's order: sorted by the hash of a key, which is a shuffle."""
    hasher = Hasher("train")
    order = sorted(range(len(source)), key=lambda index: hasher.hash_key(f"{index:09d}"))
    config = shards.WriteConfig(per_shard=_PER_SHARD, progress=progress)
    folder = shards.write(out_dir, recipe, source, config, order=order)
    assert folder is not None  # this one process writes every shard
    return folder


class _Pictures(Guarded):
    """Every so-manieth OpenMoji picture."""

    def __init__(self, names: Sequence[tuple[str, str]], count: int, size: int) -> None:
        super().__init__()
        self.names, self.count, self.size = names, count, size

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return "the OpenMoji pictures"

    def read(self, index: int) -> Sample:
        code, caption = self.names[index * len(self.names) // self.count]
        return Sample(caption, openmoji.picture(code, self.size)[None], name=code)


class Records(ArrayRecords):
    """A folder that `prepare` or `metacanvas prepare` wrote.

    Args:
      folder: the folder.
      max_skips: how many corrupt records may be replaced by the next good one before a UserError names one.
      in_memory: keep every sample decoded once it has been read.
      layout: the task and shape to read in; as they were stored by default. Where only the first frame of each
        target is stored, targets have one frame.

    Raises UserError when there is no dataset or it is incomplete.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_skips: int = 0,
        in_memory: bool = False,
        layout: Layout = AS_STORED,
    ) -> None:
        if first_frames_only(read_recipe(folder)):
            layout = dataclasses.replace(layout, first_frame=True)
        manifest.check_files(folder)
        super().__init__(folder, layout, max_skips=max_skips, in_memory=in_memory)
        manifest.check_places(folder)


def first_frames_only(recipe: Mapping[str, Any]) -> bool:
    """Whether a folder holds the first frame of its targets alone, because their latents replace the others."""
    return recipe.get("frames") == "first"


def scene_of(sample: Sample) -> Scene:
    """The ground truth of a scene's sample. Raises ValueError for a sample without one."""
    if not sample.scene:
        raise ValueError(f"the picture {sample.prompt!r} has no scene")
    return Scene.from_json(sample.scene)
