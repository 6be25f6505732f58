"""Captioned pictures on disk: written once as a TFDS array_record dataset (without TensorFlow), read at random.

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

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from metacanvas_jax.data import openmoji
from metacanvas_jax.data.scenes import Scene, SceneWorld, draw, training_scene
from metacanvas_jax.errors import UserError

_FORMAT = 1
_PER_SHARD = 8192
_RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One captioned picture. ``metadata`` and ``scene`` are JSON, empty where there is no ground truth."""

    image: UInt8[np.ndarray, "h w 3"]
    prompt: str
    metadata: str = ""
    scene: str = ""


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """What a dataset is written from."""

    png: bytes
    prompt: str
    metadata: str = ""
    scene: str = ""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes examples that were drawn elsewhere. Images are handed over encoded, which is what keeps TensorFlow out."""

    VERSION = tfds.core.Version("1.0.0")
    name = "captioned_pictures"
    code_path = (
        None  # nothing is downloaded; looking for a list of checksums would need a package TFDS does not install
    )

    def __init__(self, count: int, example: Callable[[int], _Encoded], progress: bool, **kwargs: Any) -> None:
        self._count, self._example, self._progress = count, example, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = tfds.features.FeaturesDict({"image": image, "prompt": text, "metadata": text, "scene": text})
        return tfds.core.DatasetInfo(builder=self, description="Captioned pictures.", features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in tqdm(range(self._count), "drawing", unit=" pictures", disable=not self._progress):
            example = dataclasses.asdict(self._example(index))
            yield f"{index:09d}", {"image": io.BytesIO(example.pop("png"))} | example


def prepare(
    out_dir: str | os.PathLike, world: SceneWorld, count: int, seed: int, progress: bool = True
) -> pathlib.Path:
    """Write ``count`` training scenes of a world; a folder that already holds exactly these is left as it is.

    Raises UserError when the folder holds anything else.
    """
    # Drawn before anything is written, so that missing packages leave no trace.
    openmoji.sprites(world.objects, world.colours, world.sprite, world.cell)

    def example(index: int) -> _Encoded:
        scene = training_scene(world, seed, index)
        return _Encoded(_png(draw(world, scene)), scene.prompt, json.dumps(scene.metadata), scene.to_json())

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

    def example(index: int) -> _Encoded:
        code, caption = names[index * len(names) // count]
        return _Encoded(_png(openmoji.picture(code, size)), caption)

    recipe = {"kind": "openmoji pictures", "count": count, "size": size}
    return _write(pathlib.Path(out_dir), recipe, count, example, progress)


class Records:
    """A dataset folder as a random-access source for Grain.

    Args:
      folder: what `prepare` wrote.
      max_skips: how many corrupt records may be replaced by the next good one before a UserError names one.
      in_memory: keep every sample decoded once it has been read.

    Raises UserError when there is no dataset or it is incomplete.
    """

    def __init__(self, folder: str | os.PathLike, max_skips: int = 0, in_memory: bool = False) -> None:
        self.folder, self.max_skips, self.in_memory = pathlib.Path(folder), max_skips, in_memory
        self._kept: dict[int, Sample] = {}
        self._corrupt: set[int] = set()
        read_recipe(self.folder)
        try:
            builder: Any = tfds.builder_from_directory(self.folder)
            self._check_shards(builder.info.splits["train"])
            self._source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.folder}: the dataset cannot be opened ({error}); delete it and prepare again"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r})"

    def __getitem__(self, index: int) -> Sample:
        for step in range(len(self)):
            sample = self._read((index + step) % len(self))
            if sample is not None:
                return sample
        raise UserError(f"{self.folder}: no readable record")

    def _read(self, index: int) -> Sample | None:
        """One record; None if it is corrupt and may be skipped."""
        if index in self._kept:
            return self._kept[index]
        if index in self._corrupt:
            return None
        try:
            sample = _decode(self._source[index])
        except Exception as error:  # array_record, protobuf, Pillow and UTF-8 each have their own
            self._corrupt.add(index)
            if len(self._corrupt) <= self.max_skips:
                return None
            raise UserError(
                f"{self.folder}: record {index} is corrupt ({_first_line(error)}); "
                f"{len(self._corrupt)} corrupt so far, {self.max_skips} allowed"
            ) from error
        if self.in_memory:
            self._kept[index] = sample
        return sample

    def _check_shards(self, split: Any) -> None:
        """Every shard is there and as long as it was written."""
        from array_record.python.array_record_module import ArrayRecordReader

        for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
            if not os.path.isfile(path):
                raise OSError(f"{os.path.basename(path)} is missing")
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
            if found != length:
                raise OSError(f"{os.path.basename(path)} has {found} records, expected {length}")


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
    folder: pathlib.Path, recipe: dict[str, Any], count: int, example: Callable[[int], _Encoded], progress: bool
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


def _decode(record: dict[str, Any]) -> Sample:
    with Image.open(io.BytesIO(record["image"])) as image:
        pixels = np.asarray(image.convert("RGB"))
    return Sample(pixels, *(record[key].decode() for key in ("prompt", "metadata", "scene")))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def scene_of(sample: Sample) -> Scene:
    """The ground truth of a scene's sample. Raises ValueError for a sample without one."""
    if not sample.scene:
        raise ValueError(f"the picture {sample.prompt!r} has no scene")
    return Scene.from_json(sample.scene)
