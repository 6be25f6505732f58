"""Samples in TFDS array_record folders, read at random without TensorFlow; ours and anybody else's."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from metacanvas_jax import files
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError, first_line


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


def serializer() -> Callable[[Stored], bytes]:
    """Turns stored samples into the bytes of a record."""
    known = features()

    def record(sample: Stored) -> bytes:
        values = vars(sample).copy()
        for key in ("target", "source", "references"):
            values[key] = [io.BytesIO(data) for data in values[key]]
        return known.serialize_example(known.encode_example(values))

    return record


class _Raw(tfds.decode.SkipDecoding):
    """Leaves a feature as it lies in the record, sequences too."""

    def decode_batch_example_np(self, example_data: Any) -> Any:
        """The values themselves."""
        return example_data


def raw(feature: Any) -> Any:
    """Decoders that leave every part of a feature encoded, in the structure that TFDS asks for."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: raw(part) for name, part in feature.items()}
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else None
    return raw(inner) if isinstance(inner, tfds.features.FeaturesDict) else _Raw()


_TOGETHER = 16  # shards that are opened at the same time: a bucket takes a while to answer
_OURS = "tensorflow_datasets.core.features."


def _check_features(path: pathlib.Path) -> None:
    """Raises UserError when a feature is of a class outside TFDS, which TFDS would import by its name."""
    try:
        pending: list[Any] = [files.read_json(path)]
    except UserError as error:
        raise UserError(f"{path}: no readable list of features ({first_line(error)})") from error
    while pending:
        node = pending.pop()
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        name = node.get("pythonClassName", _OURS) if isinstance(node, dict) else _OURS
        if not (isinstance(name, str) and name.startswith(_OURS)):
            raise UserError(f"{path}: a feature is of the class {name!r}, only those of TFDS itself are read")


class ArrayRecords(Guarded):
    """One split of a TFDS folder in array_record format.

    Raises UserError when there is no data set, it is incomplete or of another format.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        layout: Layout,
        split: str = "train",
        max_skips: int = 0,
        in_memory: bool = False,
    ) -> None:
        super().__init__(max_skips, in_memory)
        self.folder, self.layout, self.split = files.folder(folder), layout, split
        if not (self.folder / "dataset_info.json").is_file():
            raise UserError(f"{self.folder}: no TFDS data set there (it has no dataset_info.json)")
        _check_features(self.folder / "features.json")
        try:
            builder: Any = tfds.builder_from_directory(self.folder)
            self._check_shards(builder.info)
            # Left encoded by TFDS: frames are decoded under limits, and only those that are wanted.
            self._source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            self._features, self._decoders = builder.info.features, raw(builder.info.features)
        except (OSError, KeyError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"{self.folder}: the dataset cannot be opened ({error}); delete it and prepare again"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def read(self, index: int) -> Sample:
        """One record."""
        return self.layout.sample(self._parse(self._source[index]))

    def _parse(self, record: bytes) -> dict[str, Any]:
        return self._features.deserialize_example_np(record, decoders=self._decoders)

    def _check_shards(self, info: Any) -> None:
        """Every shard is there and as long as it was written."""
        from array_record.python.array_record_module import ArrayRecordReader

        split = self.split.partition("[")[0]
        if split not in info.splits:
            raise OSError(f"it has no split {split!r}, but {', '.join(info.splits)}")
        paths, lengths = info.splits[split].filepaths, info.splits[split].shard_lengths
        there = files.listing(self.folder)

        def counted(path: str) -> int:
            if os.path.basename(path) not in there:
                raise OSError(f"{os.path.basename(path)} is missing")
            reader = ArrayRecordReader(str(path))
            try:
                return reader.num_records()
            finally:
                reader.close()

        with ThreadPoolExecutor(_TOGETHER) as pool:
            found = list(pool.map(counted, paths))
        for path, count, length in zip(paths, found, lengths, strict=True):
            if count != length:
                raise OSError(f"{os.path.basename(path)} has {count} records, expected {length}")
