"""Samples on disk: written once as a TFDS array_record dataset (without TensorFlow), read at random.

A dataset folder is complete or absent: it is written under another name and renamed last. ``recipe.json`` in it says
what it was made from.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from metacanvas_jax.data import openmoji
from metacanvas_jax.data.array_records import ArrayRecords, Stored, features
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.data.layout import STORED, Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.scenes import Scene, SceneWorld, draw, training_scene
from metacanvas_jax.errors import UserError

_FORMAT = 2
_PER_SHARD = 8192
_RECIPE = "recipe.json"
AS_STORED = Layout(columns=STORED)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes examples that were drawn elsewhere. Images are handed over encoded, which is what keeps TensorFlow out."""

    VERSION = tfds.core.Version("1.0.0")
    name = "captioned_pictures"
    code_path = (
        None  # nothing is downloaded; looking for a list of checksums would need a package TFDS does not install
    )

    def __init__(self, count: int, example: Callable[[int], Stored], progress: bool, **kwargs: Any) -> None:
        self._count, self._example, self._progress = count, example, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description="Captioned pictures.", features=features())

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in tqdm(range(self._count), "drawing", unit=" pictures", disable=not self._progress):
            example = vars(self._example(index)).copy()
            for key in ("target", "source", "references"):
                example[key] = [io.BytesIO(data) for data in example[key]]
            yield f"{index:09d}", example


def prepare(
    out_dir: str | os.PathLike, world: SceneWorld, count: int, seed: int, progress: bool = True
) -> pathlib.Path:
    """Write ``count`` training scenes of a world; a folder that already holds exactly these is left as it is.

    Raises UserError when the folder holds anything else.
    """
    # Drawn before anything is written, so that missing packages leave no trace.
    openmoji.sprites(world.objects, world.colours, world.sprite, world.cell)

    def example(index: int) -> Stored:
        scene = training_scene(world, seed, index)
        return Stored(
            scene.prompt,
            (encode_png(draw(world, scene)),),
            name=f"scene {seed}/{index}",
            metadata=json.dumps(scene.metadata),
            scene=scene.to_json(),
        )

    recipe = {"kind": "openmoji scenes", "count": count, "seed": seed, "world": dataclasses.asdict(world)}
    return _write(pathlib.Path(out_dir), recipe, count, example, progress)


def prepare_pictures(
    out_dir: str | os.PathLike, size: int, count: int | None = None, progress: bool = True
) -> pathlib.Path:
    """Write OpenMoji pictures of ``size x size`` captioned by their names: all of them, or an even choice of ``count``.

    Raises UserError when the folder holds anything else, or there are fewer than ``count``.
    """
    names = openmoji.picture_names()
    count = len(names) if count is None else count
    if count > len(names):
        raise UserError(f"asked for {count} OpenMoji pictures, there are {len(names)}")

    def example(index: int) -> Stored:
        code, caption = names[index * len(names) // count]
        return Stored(caption, (encode_png(openmoji.picture(code, size)),), name=code)

    recipe = {"kind": "openmoji pictures", "count": count, "size": size}
    return _write(pathlib.Path(out_dir), recipe, count, example, progress)


class Records(ArrayRecords):
    """A folder that `prepare` or `metacanvas prepare` wrote.

    Args:
      folder: the folder.
      max_skips: how many corrupt records may be replaced by the next good one before a UserError names one.
      in_memory: keep every sample decoded once it has been read.
      layout: the task and shape to read in; as they were stored by default.

    Raises UserError when there is no dataset or it is incomplete.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_skips: int = 0,
        in_memory: bool = False,
        layout: Layout = AS_STORED,
    ) -> None:
        read_recipe(folder)
        super().__init__(folder, layout, max_skips=max_skips, in_memory=in_memory)


def read_recipe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a dataset folder was made from. Raises UserError when it holds no dataset."""
    path = pathlib.Path(folder) / _RECIPE
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{folder}: no dataset there; make it with `metacanvas prepare --config FILE`") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete the folder and prepare again") from error


def _write(
    folder: pathlib.Path, recipe: dict[str, Any], count: int, example: Callable[[int], Stored], progress: bool
) -> pathlib.Path:
    if count < 1:
        raise UserError(f"a dataset needs at least one picture, asked for {count}")
    recipe = json.loads(json.dumps({"format": _FORMAT, **recipe}))
    if folder.exists():
        return _same(folder, recipe)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    tfds.disable_progress_bar()
    try:
        builder = _Builder(count, example, progress, data_dir=partial, file_format="array_record")
        download = tfds.download.DownloadConfig(num_shards=-(-count // _PER_SHARD))
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size
            builder.download_and_prepare(download_config=download)
        written = pathlib.Path(builder.data_dir)
        (written / _RECIPE).write_text(json.dumps(recipe, indent=1))
        os.rename(written, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _same(folder: pathlib.Path, recipe: dict[str, Any]) -> pathlib.Path:
    try:
        found = read_recipe(folder)
    except UserError as error:
        raise UserError(f"{folder} exists and is no dataset; name another folder or delete it") from error
    if found != recipe:
        keys = [key for key in {**recipe, **found} if recipe.get(key) != found.get(key)]
        raise UserError(f"{folder} holds another dataset (it differs in {', '.join(keys)}); name another or delete it")
    return folder


def scene_of(sample: Sample) -> Scene:
    """The ground truth of a scene's sample. Raises ValueError for a sample without one."""
    if not sample.scene:
        raise ValueError(f"the picture {sample.prompt!r} has no scene")
    return Scene.from_json(sample.scene)
