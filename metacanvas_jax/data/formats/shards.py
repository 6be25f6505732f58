"""Writing samples as TFDS array_record shards, without TensorFlow: resumable, by several processes, with a manifest.

A folder is complete or absent. Work goes on in a hidden folder beside it, where a shard counts once its receipt is
there; whoever writes the last receipt renames the folder. Nobody waits for anybody.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
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
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.locks import locked
from metacanvas_jax.weights import identity
from metacanvas_jax.weights.hashes import sampled_hash

RECIPE, MANIFEST, UNFINISHED = "recipe.json", "manifest.json", "unfinished.json"
NAME, FORMAT = "samples", 2

Compute = Callable[[Sequence[Sample]], Sequence[Mapping[str, np.ndarray]]]
"""What is to be stored beside each of some samples, such as latents."""


@dataclasses.dataclass(frozen=True)
class WriteConfig:
    """How shards are written.

    ``per_shard`` samples, bad ones included, go into each. ``jpeg`` is a quality from 1 to 100 (None: PNG, without
    loss). Process ``process_index`` of ``process_count`` writes every so-manieth shard. ``batch`` samples at a time are
    given to what is computed ahead. With ``first_frame`` no more than that of a target is stored: its latents replace
    the others. Raises UserError for impossible numbers.
    """

    per_shard: int = 1024
    jpeg: int | None = None
    batch: int = 16
    process_index: int = 0
    process_count: int = 1
    progress: bool = True
    first_frame: bool = False

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
    folder = pathlib.Path(folder)
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
    if folder.exists():
        return _same(folder, recipe)
    order = range(len(source)) if order is None else order
    if len(order) < 1:
        raise UserError(f"{folder}: there is nothing to write")
    partial = folder.with_name(f".{folder.name}.partial")
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


def read_recipe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a dataset folder was made from. Raises UserError when it holds no dataset."""
    path = pathlib.Path(folder) / RECIPE
    if not path.exists():
        raise UserError(f"{folder}: no dataset there; make it with `metacanvas prepare --config FILE`")
    try:
        return files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; delete the folder and prepare again") from error


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest, after comparing every shard with its hash. Raises UserError naming the first that differs."""
    path = pathlib.Path(folder) / MANIFEST
    manifest = _manifest(path)
    check_files(folder)
    for shard in manifest["shards"]:
        file = path.with_name(os.path.basename(shard["file"]))
        if not file.is_file():
            raise UserError(f"{file}: the shard is missing")
        if _sha256(file) != shard["sha256"]:
            raise UserError(f"{file}: the shard is not what the manifest says; delete the folder and prepare again")
    return manifest


def check_files(folder: str | os.PathLike) -> None:
    """Compares the small files of a dataset, which say how its shards are read, with the hashes in its manifest.

    Raises UserError naming the first that differs. Folders of version 0.1 have no such hashes.
    """
    path = pathlib.Path(folder) / MANIFEST
    for name, digest in _manifest(path).get("files", {}).items() if path.exists() else ():
        file = path.with_name(os.path.basename(name))
        if not file.is_file() or _sha256(file) != digest:
            raise UserError(f"{file} is missing or damaged; delete the folder and prepare again")


def check_places(folder: str | os.PathLike) -> None:
    """Compares some bytes of every shard with the manifest. Raises UserError naming one in the place of another.

    Other damage is left to the checksums that records have of their own, so that bad records can be passed over.
    """
    path = pathlib.Path(folder) / MANIFEST
    shards = _manifest(path)["shards"] if path.exists() else []
    written = {shard["sampled"] for shard in shards if "sampled" in shard}
    for shard in shards:
        file = path.with_name(os.path.basename(shard["file"]))
        if "sampled" in shard and (found := _sampled(file)) != shard["sampled"] and found in written:
            raise UserError(f"{file}: this is another shard of the dataset; delete the folder and prepare again")


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = seals.opened(files.read_json(path), path)
        shards = [{**shard, "file": str(shard["file"]), "sha256": str(shard["sha256"])} for shard in manifest["shards"]]
        return manifest | {"shards": shards, "files": dict(manifest.get("files", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no manifest of `metacanvas prepare` ({error})") from error


def _sampled(file: pathlib.Path) -> str | None:
    """A hash of the size and some bytes of a file; None for one that is missing or empty."""
    if not file.is_file() or not file.stat().st_size:
        return None
    return sampled_hash([(NAME, np.memmap(file, np.uint8, mode="r"))])


def _part(order: Sequence[int], k: int, config: WriteConfig) -> Sequence[int]:
    return order[k * config.per_shard : (k + 1) * config.per_shard]


def _begin(partial: pathlib.Path, recipe: dict[str, Any]) -> None:
    """Makes the hidden folder, or checks that it is an unfinished one of the same recipe."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / UNFINISHED
    if not path.exists():
        _write_text(path, json.dumps(recipe, indent=1))
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
    from array_record.python.array_record_module import ArrayRecordWriter

    path = partial / _file(k, count)
    draft = path.with_name(f"{path.name}.tmp")
    record, written, skipped = serializer(), 0, []
    with _writing(draft):
        writer = ArrayRecordWriter(str(draft), "group_size:1")
    try:
        for samples in _chunks(source, part, skipped, config.batch if compute else 1, advance):
            arrays = compute(samples) if compute else [{}] * len(samples)
            for sample, extra in zip(samples, arrays, strict=True):
                if config.first_frame:
                    sample = dataclasses.replace(sample, target=sample.target[:1])
                data = record(stored(sample, config.jpeg, extra))
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
    os.replace(draft, path)
    receipt = {
        "file": path.name,
        "count": written,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "sampled": _sampled(path),
        "skipped": skipped,
    }
    _write_text(_receipt(partial, k, count), json.dumps(receipt))


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
            return folder if folder.exists() else None
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
        _write_text(partial / RECIPE, json.dumps(recipe, indent=1))
        hashes = {name: _sha256(partial / name) for name in ("dataset_info.json", "features.json", RECIPE)}
        manifest = {"count": sum(lengths), "skipped": len(skipped), "shards": shards, "files": hashes}
        _write_text(partial / MANIFEST, json.dumps(seals.sealed(manifest), indent=1))
        os.rename(partial, folder)
        for name in (UNFINISHED, *(path.name for path in receipts)):
            (folder / name).unlink(missing_ok=True)
    except FileNotFoundError:
        if not folder.exists():  # no other process was faster
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
    info.write_to_directory(folder)


def _same(folder: pathlib.Path, recipe: dict[str, Any]) -> pathlib.Path:
    try:
        found = read_recipe(folder)
    except UserError as error:
        raise UserError(f"{folder} exists and is no dataset; name another folder or delete it") from error
    if _of_now(found, recipe) != recipe:
        differences = ", ".join(_differences(recipe, found))
        raise UserError(f"{folder} holds another dataset (it differs in {differences}); name another or delete it")
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


def _write_text(path: pathlib.Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
