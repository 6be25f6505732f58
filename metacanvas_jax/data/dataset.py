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

import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_parser import ExampleParserNp
from tqdm import tqdm

from metacanvas_jax.data import openmoji
from metacanvas_jax.data.decoding import MediaError, decode_image, encode_png, first_line
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.scenes import Scene, SceneWorld, draw, training_scene
from metacanvas_jax.errors import UserError

_FORMAT = 2
_PER_SHARD = 8192
_RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A sample as it lies on disk: every frame is an encoded picture, ``arrays`` is a safetensors file."""

    prompt: str
    target: tuple[bytes, ...]
    task: str = "text_to_image"
    source: tuple[bytes, ...] = ()
    references: tuple[bytes, ...] = ()
    fps: float = 0.0  # 0: not a video
    name: str = ""
    metadata: str = ""
    scene: str = ""
    arrays: bytes = b""


def features() -> tfds.features.FeaturesDict:
    """What TFDS knows a sample by."""
    text = tfds.features.Text()
    frames = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3)))
    return tfds.features.FeaturesDict(
        {
            "prompt": text,
            "target": frames,
            "task": text,
            "source": frames,
            "references": frames,
            "fps": tfds.features.Scalar(np.float32),
            "name": text,
            "metadata": text,
            "scene": text,
            "arrays": text,
        }
    )


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
            # Left encoded by TFDS: frames are decoded here, under limits.
            self._source = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            self._parse = ExampleParserNp(builder.info.features.get_serialized_info()).parse_example
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
            sample = _decode(self._parse(self._source[index]))
        except Exception as error:  # array_record, protobuf, Pillow and UTF-8 each have their own
            self._corrupt.add(index)
            if len(self._corrupt) <= self.max_skips:
                return None
            raise UserError(
                f"{self.folder}: record {index} is corrupt ({first_line(error)}); "
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


def _decode(record: dict[str, Any]) -> Sample:
    target, source, references = (
        [decode_image(data) for data in record[key]] for key in ("target", "source", "references")
    )
    if not target:
        raise MediaError("no target")
    texts = {key: record[key].decode() for key in ("prompt", "task", "name", "metadata", "scene")}
    arrays = safetensors.numpy.load(record["arrays"]) if record["arrays"] else {}
    return Sample(
        target=np.stack(target),
        source=np.stack(source) if source else None,
        references=tuple(references),
        fps=float(record["fps"]) or None,
        arrays=arrays,
        **texts,
    )


def scene_of(sample: Sample) -> Scene:
    """The ground truth of a scene's sample. Raises ValueError for a sample without one."""
    if not sample.scene:
        raise ValueError(f"the picture {sample.prompt!r} has no scene")
    return Scene.from_json(sample.scene)
