"""What a folder of a user holds: the layout of its samples by the names of its files, and a look at some of them."""

import collections
import dataclasses
import os
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.sources import Kind, SourceSection
from metacanvas_jax.data.by_size import SIZES
from metacanvas_jax.data.formats.folders import CSV, JSONL
from metacanvas_jax.data.formats.shards import MANIFEST, RECIPE
from metacanvas_jax.data.layout import NAMES, Layout, place_of
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.transforms import AS_FOUND, Clip
from metacanvas_jax.errors import UserError, first_line

LOOKED = 32  # samples that are decoded to see what a source holds
EXPECTED = (
    "captioned pictures (a.jpg with a.txt), metadata.jsonl or metadata.csv with names of files and texts, .tar shards "
    "of WebDataset, .parquet files, or a folder of `metacanvas prepare`"
)
TABLES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("records", (RECIPE, MANIFEST)),
    ("tfds", ("features.json", "dataset_info.json")),
)
SHARDS: dict[str, Kind] = {".tar": "webdataset", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Own:
    """Where samples lie and in which layout, as in a ``SourceSection``.

    ``lonely`` is the number of loose files that make no sample: media without a text, and texts without a medium.
    ``by_size`` says that `metacanvas prepare --by-bucket` sorted them.
    """

    kind: Kind
    path: str
    lonely: int = 0
    by_size: bool = False


@dataclasses.dataclass(frozen=True)
class Looked:
    """Some samples of a source that were decoded: the sizes (rows, columns) of their targets, of ``count`` in all."""

    count: int
    sizes: tuple[tuple[int, int], ...]

    def lost(self, size: tuple[int, int]) -> float:
        """The median share of a target's area that is cropped where it is read in another shape."""
        shape = size[1] / size[0]
        ratios = [columns / rows / shape for rows, columns in self.sizes]
        return float(np.median([1 - min(ratio, 1 / ratio) for ratio in ratios]))

    def smaller(self, size: tuple[int, int]) -> int:
        """How many of them do not cover a shape before they are enlarged."""
        return sum(rows < size[0] or columns < size[1] for rows, columns in self.sizes)


def look(path: str | os.PathLike) -> Own:
    """The layout of a folder, of a file, or of the files that a pattern such as ``shards/*.tar`` names.

    Raises UserError where there is nothing usable, naming the files that are there, and for several sets of samples.
    """
    if not os.fspath(path):
        raise UserError(f"the folder of samples is empty text; expected {EXPECTED}")
    where = files.absolute(path)
    place = files.folder(where)
    if place.is_file():
        return Own(_of_file(where, [place.name]), where)
    if not place.exists():
        found = [match for match in files.matching(where) if match.is_file()]
        if not found:
            raise UserError(f"{path}: no such folder; expected {EXPECTED}")
        return Own(_of_file(where, [match.name for match in found]), where)
    names = list(files.listing(where, deep=True))
    if SIZES in names:
        return Own("records", where, by_size=True)
    found = layouts(names)
    if len(found) > 1:
        sets = ", ".join(f"{folder or '.'} ({kind})" for folder, kind in sorted(found.items())[:8])
        raise UserError(f"{path}: {len(found)} sets of samples, {sets}: name one of them, such as {path}/{max(found)}")
    if found:
        ((folder, kind),) = found.items()
        if kind == "parquet":
            _one_split(path, [PurePosixPath(name).name for name in names if name.endswith(".parquet")])
        return Own(kind, files.join(where, folder) if folder else where)
    captioned, lonely = pairs(names)
    if not captioned:
        raise UserError(f"{path}: nothing to train on there: {_counted(names, lonely)}; expected {EXPECTED}")
    return Own("files", where, lonely)


def layouts(names: Iterable[str]) -> dict[str, Kind]:
    """The folders that hold a set of samples, "" for the root, and its layout. Loose files make no set here.

    ``names`` are those of all files, relative to the root. What lies below a set belongs to it.
    """
    inside: dict[str, set[str]] = collections.defaultdict(set)
    for name in names:
        folder, _, base = name.rpartition("/")
        if not base.startswith("."):
            inside[folder].add(base)
    found: dict[str, Kind] = {}
    for folder in sorted(inside, key=lambda folder: (folder.count("/") + bool(folder), folder)):
        above = (folder[:end] for end in (0, *(i for i, letter in enumerate(folder) if letter == "/")))
        kind = _of_folder(inside[folder])
        if kind is not None and not any(parent in found for parent in above):
            found[folder] = kind
    return found


def _of_folder(bases: set[str]) -> Kind | None:
    """The layout of the files of one folder."""
    for kind, all_of in TABLES:
        if bases.issuperset(all_of):
            return kind
    if not bases.isdisjoint(JSONL):
        return "jsonl"
    if not bases.isdisjoint(CSV):
        return "csv"
    return next((kind for ending, kind in SHARDS.items() if any(base.endswith(ending) for base in bases)), None)


def _of_file(path: str, names: list[str]) -> Kind:
    """The layout of files by their ending."""
    kinds: dict[str, Kind] = {".jsonl": "jsonl", ".csv": "csv", **SHARDS}
    found = {kinds.get(PurePosixPath(name).suffix.lower()) for name in names}
    kind = found.pop() if len(found) == 1 else None
    if kind is None:
        raise UserError(f"{path}: {_counted(names)}; expected {EXPECTED}")
    return kind


def _one_split(path: str | os.PathLike, names: list[str]) -> None:
    """Raises UserError where parquet files are those of several splits, as on the Hugging Face hub."""
    splits = {name.partition("-")[0] for name in names} & {"train", "validation", "valid", "test", "dev"}
    if len(splits) > 1:
        raise UserError(
            f"{path}: the splits {', '.join(sorted(splits))}; name the files of one, such as 'FOLDER/train-*.parquet'"
        )


def pairs(names: Iterable[str]) -> tuple[int, int]:
    """How many loose pictures and videos have a text beside them, and how many names have one of the two only."""
    groups: dict[str, set[str]] = collections.defaultdict(set)
    wanted = Layout().keys()
    for name in names:
        if (place := place_of(name)) is not None and place[1] in wanted:
            groups[place[0]].add(place[1])
    media, texts = set(NAMES["target"]), {*NAMES["prompt"], "json"}
    captioned = sum(bool(columns & media and columns & texts) for columns in groups.values())
    return captioned, len(groups) - captioned


def _counted(names: list[str], lonely: int = 0) -> str:
    """The files that were seen, by their ending."""
    endings = collections.Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in names)
    seen = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(6))
    without = f", {lonely} of them a picture without a text or a text without a picture" if lonely else ""
    return f"{len(names)} files ({seen}){without}" if names else "no file"


def looked(section: SourceSection, clip: Clip = AS_FOUND) -> Looked:
    """Decodes some samples of a source, evenly from the first to the last, in the shape of a clip.

    Raises UserError where the source cannot be opened, and with the first reason where none of them suits its task.
    """
    source, sizes, reason = open_source(section, clip), [], ""
    for index in np.unique(np.linspace(0, len(source) - 1, LOOKED).round().astype(int)):
        try:
            sizes.append(source.read(int(index)).image.shape[:2])
        except UserError:
            raise
        except Exception as error:  # decoders, containers, parsers and UTF-8 each have their own
            reason = reason or f"{source.name(int(index))}: {first_line(error)}"
    if not sizes:
        raise UserError(f"{section.path}: no sample for the task {section.task} among those looked at ({reason})")
    return Looked(len(source), tuple(sizes))
