"""Writing samples as TFDS array_record shards, without TensorFlow: resumable, by several processes, with a manifest.

A folder is complete or absent. Work goes on in a hidden folder beside it, where a shard counts once its receipt is
there; whoever writes the last receipt renames the folder. Nobody waits for anybody. A bucket knows no renaming: there
work goes on in the folder itself, which is a data set once its recipe is there.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from metacanvas_jax import files, seals
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.data.formats.array_records import Stored, features, serializer
from metacanvas_jax.data.formats.manifest import MANIFEST, NAME, RECIPE, read_recipe, sampled
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.samples import SOURCE_FRAMES, Sample
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.locks import locked
from metacanvas_jax.weights import identity
from metacanvas_jax.weights.hashes import file_hash

UNFINISHED = "unfinished.json"
FORMAT = 2

Compute = Callable[[Sequence[Sample]], Sequence[Mapping[str, np.ndarray]]]
"""What is to be stored beside each of some samples, such as latents."""


@dataclasses.dataclass(frozen=True)
class WriteConfig:
    """How shards are written.

    ``per_shard`` samples, bad ones included, go into each. ``jpeg`` is a quality from 1 to 100 (None: PNG, without
    loss). Process ``process_index`` of ``process_count`` writes every so-manieth shard. ``batch`` samples at a time are
    given to what is computed ahead. With ``first_frame`` no more than that of a target is stored: its latents replace
    the others. Of a video edit's source only ``source_frames`` are then stored (empty: all). Raises UserError for
    impossible numbers.
    """

    per_shard: int = 1024
    jpeg: int | None = None
    batch: int = 16
    process_index: int = 0
    process_count: int = 1
    progress: bool = True
    first_frame: bool = False
    source_frames: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.per_shard < 1 or self.batch < 1:
            raise UserError(f"per_shard is {self.per_shard} and batch {self.batch}, expected at least 1")
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise UserError(f"the JPEG quality is {self.jpeg}, expected 1 to 100")
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process {self.process_index} of {self.process_count}: expected 0 up to the count")


WRITE_ALL = WriteConfig()


def write(
    folder: str | os.PathLike,
    recipe: Mapping[str, Any],
    source: Guarded,
    config: WriteConfig = WRITE_ALL,
    *,
    order: Sequence[int] | None = None,
    compute: Compute | None = None,
) -> pathlib.Path | None:
    """Write a source; a folder that already holds exactly this recipe is left as it is.

    Returns the folder, or None while shards of other processes are missing. Bad records are left out, up to the
    source's ``max_skips``. ``order`` gives the numbers of the records to write (all by default). After an interruption
    the same call goes on with the first shard that is missing.

    Raises UserError when the folder, or the unfinished one, holds anything else, too many records are bad, or another
    process writes the same shards.
    """
    folder = files.folder(folder)
    recipe = json.loads(json.dumps(recipe))
    with locked(folder.parent, name=f".{folder.name}.{config.process_index}.lock"), files.writing(folder):
        return _write_missing(folder, recipe, source, config, order, compute)


def _write_missing(
    folder: pathlib.Path,
    recipe: Mapping[str, Any],
    source: Guarded,
    config: WriteConfig,
    order: Sequence[int] | None,
    compute: Compute | None,
) -> pathlib.Path | None:
    local = files.is_local(folder)
    if folder.exists() if local else (folder / RECIPE).exists():
        return _same(folder, recipe)
    order = range(len(source)) if order is None else order
    if len(order) < 1:
        raise UserError(f"{folder}: there is nothing to write")
    partial = folder.with_name(f".{folder.name}.partial") if local else folder
    _begin(partial, {**recipe, "shards of": config.per_shard, "records": len(order)})
    count = -(-len(order) // config.per_shard)
    mine = [k for k in range(count) if k % config.process_count == config.process_index]
    rest = [k for k in mine if not _receipt(partial, k, count).exists()]
    total = sum(len(_part(order, k, config)) for k in rest)
    with tqdm(total=total, desc=f"writing {folder.name}", unit=" samples", disable=not config.progress) as bar:
        for k in rest:
            _write_shard(partial, k, count, source, _part(order, k, config), config, compute, bar.update)
    return _finish(folder, partial, recipe, count, source)


def stored(sample: Sample, jpeg: int | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> Stored:
    """A sample with its pixels encoded, and ``arrays`` beside those it has."""

    def encoded(pixels: np.ndarray) -> bytes:
        if jpeg is None:
            return encode_png(pixels)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=jpeg, subsampling=0)
        return buffer.getvalue()

    together = {**sample.arrays, **(arrays or {})}
    return Stored(
        sample.prompt,
        tuple(encoded(frame) for frame in sample.target),
        sample.task,
        () if sample.source is None else tuple(encoded(frame) for frame in sample.source),
        tuple(encoded(picture) for picture in sample.references),
        sample.fps or 0.0,
        sample.name,
        sample.metadata,
        sample.scene,
        safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in together.items()}) if together else b"",
    )


def _part(order: Sequence[int], k: int, config: WriteConfig) -> Sequence[int]:
    return order[k * config.per_shard : (k + 1) * config.per_shard]


def _begin(partial: pathlib.Path, recipe: dict[str, Any]) -> None:
    """Makes the hidden folder, or checks that it is an unfinished one of the same recipe."""
    if files.is_local(partial):
        partial.mkdir(parents=True, exist_ok=True)
    path = partial / UNFINISHED
    if not path.exists():
        if not files.is_local(partial) and files.listing(partial):
            raise UserError(f"{partial} exists and is no dataset; name another folder or delete it")
        write_text(path, json.dumps(recipe, indent=1))
    if (found := files.read_json(path)) != recipe:
        raise UserError(
            f"{partial} holds an unfinished preparation of something else (it differs in "
            f"{', '.join(_differences(recipe, found))}); delete it or name another folder"
        )


def _write_shard(
    partial: pathlib.Path,
    k: int,
    count: int,
    source: Guarded,
    part: Sequence[int],
    config: WriteConfig,
    compute: Compute | None,
    advance: Callable[[int], Any],
) -> None:
    with contextlib.ExitStack() as stack:
        home = partial  # where the shard is written before it takes its place
        if not files.is_local(partial):
            home = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metacanvas-")))
        draft = home / f"{_file(k, count)}.tmp"
        written, skipped = _write_records(draft, source, part, config, compute, advance)
        receipt = {
            "file": _file(k, count),
            "count": written,
            "bytes": files.size(draft),
            "sha256": file_hash(draft),
            "sampled": sampled(draft),
            "skipped": skipped,
        }
        if home == partial:
            os.replace(draft, partial / _file(k, count))
        else:
            files.upload(draft, partial / _file(k, count))
    write_text(_receipt(partial, k, count), json.dumps(receipt))


def _write_records(
    draft: pathlib.Path,
    source: Guarded,
    part: Sequence[int],
    config: WriteConfig,
    compute: Compute | None,
    advance: Callable[[int], Any],
) -> tuple[int, list[str]]:
    """Writes the records of a shard; returns their number, and the names of bad ones."""
    from array_record.python.array_record_module import ArrayRecordWriter

    record, written, skipped = serializer(), 0, []
    with _writing(draft):
        writer = ArrayRecordWriter(str(draft), "group_size:1")
    try:
        for samples in _chunks(source, part, skipped, config.batch if compute else 1, advance):
            arrays = compute(samples) if compute else [{}] * len(samples)
            for sample, extra in zip(samples, arrays, strict=True):
                data = record(stored(*_needed(sample, extra, config)))
                with _writing(draft):
                    writer.write(data)
                written += 1
        with _writing(draft):
            writer.close()
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        draft.unlink(missing_ok=True)
        raise
    return written, skipped


def _needed(
    sample: Sample, arrays: Mapping[str, np.ndarray], config: WriteConfig
) -> tuple[Sample, int | None, Mapping[str, np.ndarray]]:
    """The arguments of ``stored``: the sample without the frames that its latents replace."""
    if config.first_frame:
        sample = dataclasses.replace(sample, target=sample.target[:1])
    if config.first_frame and config.source_frames and sample.task == "video_editing":
        kept = np.asarray(config.source_frames, np.int32)
        sample = dataclasses.replace(sample, source=sample.source[kept])
        arrays = {**arrays, SOURCE_FRAMES: kept}
    return sample, config.jpeg, arrays


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the writer of records raises, on a full disk for instance, into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error


def _chunks(
    source: Guarded, part: Sequence[int], skipped: list[str], size: int, advance: Callable[[int], Any]
) -> Iterator[list[Sample]]:
    """Good samples, ``size`` at a time or fewer; the names of bad ones go to ``skipped``."""
    chunk: list[Sample] = []
    for index in part:
        sample = source.try_read(index)
        advance(1)
        if sample is None:
            skipped.append(source.name(index))
            continue
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _finish(
    folder: pathlib.Path, partial: pathlib.Path, recipe: dict[str, Any], count: int, source: Guarded
) -> pathlib.Path | None:
    """The complete folder, or None while receipts are missing."""
    receipts = [_receipt(partial, k, count) for k in range(count)]
    try:
        if not all(path.exists() for path in receipts):
            return folder if (folder / RECIPE).exists() else None
        shards = [files.read_json(path) for path in receipts]
        skipped = [name for shard in shards for name in shard["skipped"]]
        if len(skipped) > source.max_skips:
            raise UserError(
                f"{source}: {len(skipped)} records are corrupt, {source.max_skips} allowed; the first is {skipped[0]}"
            )
        lengths = [shard["count"] for shard in shards]
        if sum(lengths) == 0:
            raise UserError(f"{source}: no readable record")
        _write_info(partial, lengths, sum(shard["bytes"] for shard in shards))
        described = json.dumps(recipe, indent=1)
        hashes = {name: file_hash(partial / name) for name in ("dataset_info.json", "features.json")}
        hashes[RECIPE] = hashlib.sha256(described.encode()).hexdigest()
        manifest = {"count": sum(lengths), "skipped": len(skipped), "shards": shards, "files": hashes}
        write_text(partial / MANIFEST, json.dumps(seals.sealed(manifest), indent=1))
        write_text(partial / RECIPE, described)  # last: it tells that a folder in a bucket is complete
        if partial != folder:
            os.rename(partial, folder)
        for name in (*(path.name for path in receipts), UNFINISHED):
            files.remove(folder / name)
    except (FileNotFoundError, UserError):
        if not (folder / RECIPE).exists():  # no other process was faster
            raise
    return folder


def _write_info(folder: pathlib.Path, lengths: list[int], size: int) -> None:
    """What lets TFDS open the folder."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, description="Samples of metacanvas_jax.", features=features())
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    if files.is_local(folder):
        info.write_to_directory(folder)
        return
    with tempfile.TemporaryDirectory(prefix="metacanvas-") as near:
        info.write_to_directory(near)
        for name in files.listing(near):
            files.upload(pathlib.Path(near) / name, folder / name)


def _same(folder: pathlib.Path, recipe: dict[str, Any]) -> pathlib.Path:
    try:
        found = read_recipe(folder)
    except UserError as error:
        raise UserError(f"{folder} exists and is no dataset; name another folder or delete it") from error
    if _of_now(found, recipe) != recipe:
        differences = ", ".join(_differences(recipe, found))
        raise UserError(f"{folder} holds another dataset (it differs in {differences}); name another or delete it")
    if files.is_local(folder):
        shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
    return folder


def _of_now(found: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the identity of the same weights as ``recipe`` writes it, where both have latents."""
    try:
        there, here = (r["computed"]["autoencoder"] for r in (found, recipe))
        if identity.same(there["weights"], here["weights"]):
            there = {**there, "weights": here["weights"]}
            return {**found, "computed": {**found["computed"], "autoencoder": there}}
    except (KeyError, TypeError, AttributeError, ValueError):  # one of them has no latents
        pass
    return found


def _differences(recipe: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [key for key in {**recipe, **found} if recipe.get(key) != found.get(key)]


def _file(k: int, count: int) -> str:
    return f"{NAME}-train.array_record-{k:05d}-of-{count:05d}"


def _receipt(partial: pathlib.Path, k: int, count: int) -> pathlib.Path:
    return partial / f"{_file(k, count)}.receipt.json"


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole file that other processes may write at the same time."""
    if not files.is_local(path):
        files.write(path, text)
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
