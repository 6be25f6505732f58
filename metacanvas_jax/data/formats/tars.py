"""WebDataset tars (BLIP3o-60k: ``NAME.jpg`` + ``NAME.txt``), read at random through an index made once per shard.

Nothing is ever extracted to disk. The index lies beside the shard, or in a cache folder where that cannot be written.
"""

import hashlib
import json
import os
import pathlib
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.data.decoding import MediaError
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout, gathered, place_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.retries import retried

_FORMAT = 2
_TOGETHER = 16  # shards whose indices are read at the same time: a bucket takes a while to answer
_DAMAGE = "!"  # no extension is called so
_ENDS_INSIDE = "the shard is truncated (it ends inside a block)"


class WebDataset(Guarded):
    """The samples of tar shards, in their order. A damaged member, or end of a shard, is one bad record.

    Raises UserError for a shard that is compressed or no tar.
    """

    def __init__(
        self,
        paths: Sequence[pathlib.Path],
        layout: Layout,
        cache: str = "",
        max_skips: int = 0,
        in_memory: bool = False,
    ) -> None:
        super().__init__(max_skips, in_memory)
        self.paths, self.layout = list(paths), layout
        with ThreadPoolExecutor(_TOGETHER) as pool:
            indices = list(pool.map(lambda path: load_index(path, cache), self.paths))
        self._entries: list[tuple[int, str, dict[str, Any]]] = [
            (shard, key, members) for shard, index in enumerate(indices) for key, members in index.items()
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"WebDataset({str(self.paths[0])!r}, {len(self.paths)} shards)"

    def name(self, index: int) -> str:
        """Shard and key."""
        shard, key, _ = self._entries[index]
        return f"{self.paths[shard].name}/{key}"

    def read(self, index: int) -> Sample:
        """The sample whose members share a key."""
        shard, _, members = self._entries[index]
        if _DAMAGE in members:
            raise MediaError(members[_DAMAGE])
        wanted = self.layout.keys()
        spans = {name: span for name, span in members.items() if name in wanted or name.startswith("references.")}
        for _, size in spans.values():
            if size > self.layout.limits.bytes:
                raise MediaError(f"a member of {size} bytes, at most {self.layout.limits.bytes} are allowed")
        found = files.read_ranges(self.paths[shard], list(spans.values()))
        row: dict[str, Any] = {"__key__": self.name(index)}
        for (extension, (_, size)), data in zip(spans.items(), found, strict=True):
            if len(data) < size:
                raise MediaError(f"its .{extension} is truncated: {len(data)} of {size} bytes")
            row[extension] = data
        return self.layout.sample(gathered(row))


def load_index(path: pathlib.Path, cache: str = "") -> dict[str, dict[str, Any]]:
    """Offset and size of every member, by key and extension; made and kept where there is none of this very file."""
    try:
        size, version = files.stamp(path)
    except OSError as error:
        raise UserError(f"{path}: no such tar ({error.strerror or error})") from error
    stamp = [_FORMAT, size, int(version) if version.isdigit() else version]
    places = _places(path, cache)
    for place in places:
        try:
            found = files.read_json(place)
        except UserError:
            continue
        if found.get("stamp") == stamp and _is_index(found.get("entries"), size):
            return found["entries"]
    entries = retried(lambda: make_index(path), path)
    text = json.dumps({"stamp": stamp, "entries": entries})
    for place in places:
        if _write(place, text):
            break
    return entries


def make_index(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The index of a shard. What cannot be read in it becomes one bad record, so that no sample is lost in silence.

    Raises UserError for what is compressed or no tar.
    """
    entries: dict[str, dict[str, Any]] = {}
    size = files.size(path)
    damage = ""
    try:
        with (
            files.stream(path) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):  # "r:" refuses compression, which has no random access
            try:
                for member in archive:
                    _add(entries, member, size)
            except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
                damage = f"the shard is damaged after byte {archive.offset} ({first_line(error)})"
            else:
                cut = 0 < size - archive.offset < tarfile.BLOCKSIZE
                damage = _ENDS_INSIDE if cut else _left(path, archive.offset)
    except (tarfile.TarError, EOFError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: no uncompressed tar ({first_line(error)}); unpack .tar.gz, which cannot be read at random"
        ) from error
    if not damage and size % tarfile.BLOCKSIZE and not any(_DAMAGE in members for members in entries.values()):
        damage = _ENDS_INSIDE
    if damage:
        entries[f"(end at byte {size})"] = {_DAMAGE: damage}
    return entries


def _left(path: pathlib.Path, at: int) -> str:
    """What is wrong with the rest of a shard, after the byte where its reader stopped; "" for the zeros of an end."""
    with files.stream(path) as file:
        file.seek(at)
        while block := file.read(1 << 20):
            if rest := block.lstrip(b"\0"):
                place = file.tell() - len(rest)
                return f"data follow the end mark, from byte {place} on: a second archive, or a damaged header"
    return ""


def _add(entries: dict[str, dict[str, Any]], member: tarfile.TarInfo, size: int) -> None:
    if member.isdir():
        return
    # Bytes that are not UTF-8 come as surrogates, which cannot be written; such names are read as Latin-1.
    name = member.name
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        name = name.encode("utf-8", "surrogateescape").decode("latin-1")
    place = place_of(name)
    if place is None:
        return
    members = entries.setdefault(place[0], {})
    if not member.isreg():
        members[_DAMAGE] = f"{name} is a link or device"
    elif member.issparse():
        members[_DAMAGE] = f"{name} is a sparse file"
    elif name.startswith("/") or ".." in name.split("/"):
        members[_DAMAGE] = f"{name} points outside the archive"
    elif place[1] in members:
        members[_DAMAGE] = f"there are two members {name}"
    elif member.size < 0:
        members[_DAMAGE] = f"{name} has the size {member.size}: its header is damaged"
    elif member.offset_data + member.size > size:
        members[_DAMAGE] = f"the shard is truncated inside {name}"
    else:
        members[place[1]] = (member.offset_data, member.size)


def _is_index(entries: Any, size: int) -> bool:
    """Whether entries of an index file have the form of ``make_index`` and lie inside a shard of ``size`` bytes."""

    def is_member(name: Any, value: Any) -> bool:
        if name == _DAMAGE:
            return isinstance(value, str)
        whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
        return whole and value[0] >= 0 and value[1] >= 0 and sum(value) <= size

    return isinstance(entries, dict) and all(
        isinstance(members, dict) and all(is_member(*item) for item in members.items()) for members in entries.values()
    )


def _places(path: pathlib.Path, cache: str) -> list[pathlib.Path]:
    whole = str(path.resolve()) if files.is_local(path) else str(path)
    name = f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"
    if cache:
        return [files.folder(cache) / name]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return [path.with_name(path.name + ".index.json"), home / "metacanvas_jax" / "tars" / name]


def _write(place: pathlib.Path, text: str) -> bool:
    """Writes a file whole or not at all; False where that is not allowed."""
    try:
        with files.draft(place) as draft:
            draft.write_text(text)
    except UserError:
        return False
    return True
