"""WebDataset tars (BLIP3o-60k: ``NAME.jpg`` + ``NAME.txt``), read at random through an index made once per shard.

Nothing is ever extracted to disk. The index lies beside the shard, or in a cache folder where that cannot be written.
"""

import hashlib
import json
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any

from metacanvas_jax.data.decoding import MediaError, first_line
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError

_FORMAT = 1
_DAMAGE = "!"  # no extension is called so


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
        self._entries: list[tuple[int, str, dict[str, Any]]] = [
            (shard, key, members)
            for shard, path in enumerate(self.paths)
            for key, members in load_index(path, cache).items()
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
        row: dict[str, Any] = {"__key__": self.name(index)}
        with open(self.paths[shard], "rb") as file:
            for extension, (offset, size) in members.items():
                if extension in wanted:
                    if size > self.layout.limits.bytes:
                        raise MediaError(f"a member of {size} bytes, at most {self.layout.limits.bytes} are allowed")
                    file.seek(offset)
                    row[extension] = file.read(size)
                    if len(row[extension]) < size:
                        raise MediaError(f"its .{extension} is truncated: {len(row[extension])} of {size} bytes")
        return self.layout.sample(row)


def load_index(path: pathlib.Path, cache: str = "") -> dict[str, dict[str, Any]]:
    """Offset and size of every member, by key and extension; made and kept where there is none of this very file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such tar ({error.strerror})") from error
    stamp = [_FORMAT, stat.st_size, stat.st_mtime_ns]
    places = _places(path, cache)
    for place in places:
        try:
            found = json.loads(place.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("stamp") == stamp:
            return found["entries"]
    entries = make_index(path)
    text = json.dumps({"stamp": stamp, "entries": entries})
    for place in places:
        if _write(place, text):
            break
    return entries


def make_index(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The index of a shard. Raises UserError for what is compressed or no tar."""
    entries: dict[str, dict[str, Any]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:  # "r:" refuses compression, which has no random access
            try:
                for member in archive:
                    _add(entries, member, size)
            except tarfile.ReadError as error:
                entries[f"(end at byte {size})"] = {_DAMAGE: f"the shard is truncated ({first_line(error)})"}
    except (tarfile.ReadError, EOFError) as error:
        raise UserError(
            f"{path}: no uncompressed tar ({first_line(error)}); unpack .tar.gz, which cannot be read at random"
        ) from error
    if size % tarfile.BLOCKSIZE and not any(_DAMAGE in members for members in entries.values()):
        entries[f"(end at byte {size})"] = {_DAMAGE: "the shard is truncated (it ends inside a block)"}
    return entries


def _add(entries: dict[str, dict[str, Any]], member: tarfile.TarInfo, size: int) -> None:
    if member.isdir():
        return
    folder, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:  # hidden files, such as ._NAME that macOS adds
        return
    members = entries.setdefault(f"{folder}/{stem}" if folder else stem, {})
    extension = extension.lower()
    if not member.isreg():
        members[_DAMAGE] = f"{member.name} is a link or device"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        members[_DAMAGE] = f"{member.name} points outside the archive"
    elif extension in members:
        members[_DAMAGE] = f"there are two members {member.name}"
    elif member.offset_data + member.size > size:
        members[_DAMAGE] = f"the shard is truncated inside {member.name}"
    else:
        members[extension] = (member.offset_data, member.size)


def _places(path: pathlib.Path, cache: str) -> list[pathlib.Path]:
    name = f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    if cache:
        return [pathlib.Path(cache) / name]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return [path.with_name(path.name + ".index.json"), home / "metacanvas_jax" / "tars" / name]


def _write(place: pathlib.Path, text: str) -> bool:
    """Writes a file whole or not at all; False where that is not allowed."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(draft, place)
    except OSError:
        return False
    return True
