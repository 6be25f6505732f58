"""Files that a user names: in a folder of this machine, or in a bucket (``gs://BUCKET/...``).

Everything that a user can name goes through this module or `buckets.py`, so that a local path and a bucket mean the
same everywhere. ``folder`` gives a path with pathlib's methods. ``read_bytes``, ``read_text`` and ``read_json`` read
whole small files, ``read_range`` and ``read_ranges`` parts of large ones, ``stream`` is an open file for libraries that
seek. ``listing`` and ``matching`` find files. ``local_copy`` is for libraries that read files of this machine only.
``write`` and ``upload`` write whole files or none. Errors that pass (a bucket that does not answer, a network disk that
was away) are tried again with back-off; what still fails then is ``Unreachable``, never corruption.
"""

import contextlib
import functools
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from etils import epath

from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.retries import passes, retried

LONGEST_NAME = 240  # bytes of a file's name that file systems take, with room for the ending of a draft
LARGEST = 1 << 28  # bytes of a small file; media and weights have limits of their own
BLOCK = 1 << 22  # bytes that a stream of a bucket asks for at a time
_TOGETHER = 32  # ranges of one file that are asked for at the same time
_JSON_TYPES = {dict: "object", list: "array"}
_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent if (_PACKAGE.parent / "configs" / "base.py").exists() else _PACKAGE / "bundled"
"""The folder of ``configs/``: the source tree, or the copy inside the installed package."""
_SCHEMES = ("gs", "s3", "az", "hf")  # those that etils.epath, and with it Orbax, knows


def folder(path: str | os.PathLike) -> Path:
    """A path that knows where it lies: pathlib's if that is this machine, else epath's, which has the same methods.

    Raises:
        UserError: the package that reads and writes there is not installed, or there is none.
    """
    name = os.fspath(path)
    if name.startswith("file://"):
        return Path(name.removeprefix("file://"))
    if is_local(name):
        return Path(name)
    _filesystem(name.partition("://")[0], name)
    return epath.Path(name)


def is_local(path: str | os.PathLike) -> bool:
    """Whether files can be appended to and renamed there; object stores write whole files, at once."""
    return "://" not in os.fspath(path).removeprefix("file://")


def join(base: str | os.PathLike, path: str | os.PathLike) -> str:
    """``path`` below ``base``, as text; ``path`` itself where it is empty, absolute or a URL, or ``base`` is empty."""
    base, path = os.fspath(base), os.fspath(path)
    if not base or not path or os.path.isabs(path) or "://" in path:
        return path
    return f"{base.rstrip('/')}/{path}" if base.strip("/") else f"/{path}"


def absolute(path: str | os.PathLike) -> str:
    """The same path as text, from the root; a URL is one already."""
    return os.fspath(path) if not is_local(path) else str(folder(path).absolute())


@functools.lru_cache(maxsize=8)
def _checked(scheme: str) -> None:
    """Prepares the package for a scheme. Raises ImportError or ValueError where there is none."""
    if scheme not in _SCHEMES:
        raise ValueError(f"expected a folder, or one of {', '.join(f'{known}://' for known in _SCHEMES)}")
    # Listings that are kept would hide what other processes, and Orbax in this one, have written since.
    for name in ("gs", "gcs", "s3", "az") if scheme != "hf" else ():
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    os.environ.setdefault("EPATH_USE_TF", "false")  # one implementation, whether or not TensorFlow is installed
    fsspec.get_filesystem_class(scheme)


def _filesystem(scheme: str, where: str) -> fsspec.AbstractFileSystem:
    try:
        _checked(scheme)
    except ImportError as error:
        hint = "; pip install 'metacanvas_jax[gcs]'" if scheme == "gs" else ""
        raise UserError(f"{where}: {first_line(error)}{hint}") from error
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    return fsspec.filesystem(scheme, **({"finalize_on_close": True} if scheme == "gs" else {}))


def _store(path: str | os.PathLike) -> fsspec.AbstractFileSystem | None:
    """What reads and writes the bucket of a path; None for one of this machine."""
    name = os.fspath(path)
    return None if is_local(name) else _filesystem(name.partition("://")[0], name)


def size(path: str | os.PathLike) -> int:
    """Bytes of a file. Raises OSError where there is none."""
    return stamp(path)[0]


def stamp(path: str | os.PathLike) -> tuple[int, str]:
    """Bytes of a file, and a text that changes when it is written again. Raises OSError where there is none."""
    store = _store(path)
    if store is None:
        found = os.stat(folder(path))
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(f"{os.fspath(path)} is no regular file")
        return found.st_size, str(found.st_mtime_ns)
    info = retried(lambda: store.info(os.fspath(path)), path)
    if info["type"] != "file":
        raise IsADirectoryError(f"{os.fspath(path)} is a folder")
    version = next((info[key] for key in ("generation", "etag", "ETag", "mtime", "updated") if info.get(key)), "")
    return int(info["size"]), str(version)


def read_range(path: str | os.PathLike, start: int, count: int) -> bytes:
    """``count`` bytes of a file from byte ``start``, fewer where it ends; no others are read or sent.

    Raises:
        Unreachable: it could not be read in any of several tries.
        OSError: it is missing, or may not be read.
    """
    return read_ranges(path, [(start, count)])[0]


def read_ranges(path: str | os.PathLike, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several ``(start, count)`` of one file, of a bucket at the same time. Raises as ``read_range`` does."""
    store, name = _store(path), os.fspath(path)

    def near() -> list[bytes]:
        with folder(path).open("rb", buffering=0) as file:
            return [_at(file, start, count) for start, count in spans]

    def far(span: tuple[int, int]) -> bytes:
        start, count = span
        if not count:
            return b""
        try:
            return store.cat_file(name, start=start, end=start + count)
        except Exception as error:
            if passes(error) or isinstance(error, OSError) or start < size(name):
                raise
            return b""  # a bucket refuses a range that begins behind the end

    if store is None:
        return retried(near, path)
    if len(spans) == 1:
        return [retried(lambda: far(spans[0]), path)]
    with ThreadPoolExecutor(min(len(spans), _TOGETHER)) as pool:
        return list(pool.map(lambda span: retried(lambda: far(span), path), spans))


def _at(file: IO[bytes], start: int, count: int) -> bytes:
    file.seek(start)
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def stream(path: str | os.PathLike, *, block: int = BLOCK) -> IO[bytes]:
    """An open file that can be sought in; of a bucket ``block`` bytes are read ahead of each place that is asked for.

    Raises OSError where there is none.
    """
    store = _store(path)
    if store is None:
        return folder(path).open("rb")
    return retried(lambda: store.open(os.fspath(path), "rb", block_size=block, cache_type="readahead"), path)


def listing(path: str | os.PathLike, *, deep: bool = False) -> dict[str, int]:
    """Names of the files in a folder, in order, with their bytes; with ``deep`` those below it too (``a/b.jpg``).

    Names are relative and use ``/``. What is no regular file is left out. A folder that is not there is empty.
    """
    store = _store(path)
    if store is None:
        root = folder(path)
        found = [file for file in (root.rglob("*") if deep else root.glob("*")) if file.is_file()]
        return {file.relative_to(root).as_posix(): file.stat().st_size for file in sorted(found)}
    root = store._strip_protocol(os.fspath(path)).rstrip("/")

    def found_there() -> dict[str, Any]:
        try:
            return store.find(root, maxdepth=None if deep else 1, detail=True)
        except FileNotFoundError:
            return {}

    known = {name[len(root) + 1 :]: info for name, info in retried(found_there, path).items()}
    names = sorted(name for name in known if name and not name.endswith("/"))
    return {name: int(known[name]["size"]) for name in sorted(names, key=lambda name: PurePosixPath(name).parts)}


def matching(pattern: str) -> list[Path]:
    """The files that a pattern of the shell names (``*``, ``?``, ``[...]``, ``**``), in order; there may be none."""
    store = _store(pattern)
    if store is None:
        return [Path(name) for name in sorted(glob.glob(os.fspath(folder(pattern)), recursive=True))]
    scheme = pattern.partition("://")[0]
    found = sorted(retried(lambda: store.glob(pattern), pattern))
    return [folder(f"{scheme}://{name}") for name in found if not name.rpartition("/")[2].startswith(".")]


@contextlib.contextmanager
def local_copy(path: str | os.PathLike, *names: str) -> Iterator[Path]:
    """A folder of this machine with the files of ``path``: itself, or a copy that is removed at the end.

    ``names`` are the files to copy, as far as they are there (all by default, those below it too). For libraries that
    read local files only.
    """
    if _store(path) is None:
        yield folder(path)
        return
    with tempfile.TemporaryDirectory(prefix="metacanvas-") as near:
        for name in listing(path, deep=not names):
            if not names or name in names:
                download(join(path, name), Path(near) / name)
        yield Path(near)


def download(path: str | os.PathLike, near: Path) -> None:
    """Copies a file to this machine, block by block. Raises OSError where there is none."""
    near.parent.mkdir(parents=True, exist_ok=True)

    def copied() -> None:
        with stream(path, block=1 << 24) as source, near.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)

    retried(copied, path)


@contextlib.contextmanager
def draft(path: str | os.PathLike) -> Iterator[Path]:
    """A file of this machine to write, which takes its place when the block ends well, and is removed when not.

    For libraries that write local files only. Raises UserError when the file cannot be written.
    """
    if _store(path) is not None:
        with tempfile.TemporaryDirectory(prefix="metacanvas-") as near:
            yield Path(near) / "draft"
            upload(Path(near) / "draft", path)
        return
    target = folder(path)
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            yield beside
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def upload(near: Path, path: str | os.PathLike) -> None:
    """Copies a file of this machine to its place, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    store = _store(path)
    if store is None:
        with draft(path) as beside:
            shutil.copyfile(near, beside)
        return
    with writing(path):
        retried(lambda: store.put_file(str(near), os.fspath(path)), path)


def remove(path: str | os.PathLike) -> None:
    """Removes a file, or a folder with all that is in it; nothing where there is none."""
    store = _store(path)
    if store is None:
        near = folder(path)
        if near.is_dir() and not near.is_symlink():
            shutil.rmtree(near)
        else:
            near.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        retried(lambda: store.rm(os.fspath(path), recursive=True), path)


def read_bytes(path: str | os.PathLike, limit: int = LARGEST, *, hint: str = "") -> bytes:
    """The contents of a file; ``hint`` follows the message about one that is missing.

    Raises:
        UserError: it is missing, cannot be read, or lies on this machine and is larger than ``limit`` bytes or no
            regular file: a pipe would block and a device never ends.
    """
    name = os.fspath(path)
    path = folder(path)
    try:
        if is_local(name):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{name}: {'a folder' if path.is_dir() else 'no regular file'}, expected a file")
            if found.st_size > limit:
                raise UserError(f"{name}: {found.st_size} bytes, at most {limit} are allowed in such a file")
        return retried(path.read_bytes, name)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file" + (f"; {hint}" if hint else "")) from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error


def read_text(path: str | os.PathLike, limit: int = LARGEST, *, hint: str = "") -> str:
    """The text of a UTF-8 file. Raises UserError as ``read_bytes`` does, and for bytes that are not UTF-8."""
    try:
        return read_bytes(path, limit, hint=hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8 text (byte {error.start})") from error


def read_json(path: str | os.PathLike, kind: type = dict, limit: int = LARGEST, *, hint: str = "") -> Any:
    """The value of a JSON file, an object unless ``kind`` is another type.

    Raises UserError as ``read_text`` does, and for what is not JSON, nested too deep, or of another type.
    """
    name, text = os.fspath(path), read_text(path, limit, hint=hint)
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name}: not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        expected = _JSON_TYPES.get(kind, kind.__name__)
        raise UserError(f"{name}: expected a JSON {expected}, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns no space, no permission and the like into a UserError of one line that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike) -> None:
    """Raises UserError when a file cannot be written there; writes nothing, and makes no folder.

    For work that takes long: what is wrong with its place is said before it begins. Of a bucket nothing is checked.
    """
    if not is_local(path):
        return
    path = Path(path)
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(f"cannot write {path.parent}: a name of {len(os.fsencode(path.name))} bytes is too long")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    there = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if not path.exists() and not there.is_dir():
        raise UserError(f"cannot write {path}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write to {there}")


def write(path: Path, data: str | bytes) -> None:
    """Writes a whole file, with the folders above it; there is the old one or the new one, never a part.

    Raises:
        UserError: it cannot be written.
    """
    data = data.encode() if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            retried(lambda: path.write_bytes(data), path)
            return
        beside = path.with_name(path.name + ".tmp")
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:  # a full disk: nothing half-written remains
            beside.unlink(missing_ok=True)
            raise
