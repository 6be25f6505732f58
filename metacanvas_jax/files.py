"""Small files of a run, in a local folder or under ``gs://`` and the like (through etils.epath and fsspec).

``read_bytes`` and ``read_json`` are the one place where files that a user names are opened.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from metacanvas_jax.errors import UserError, first_line

LONGEST_NAME = 240  # bytes of a file's name that file systems take, with room for the ending of a draft
LARGEST = 1 << 28  # bytes of a small file; media and weights have limits of their own
_JSON_TYPES = {dict: "object", list: "array"}


def folder(path: str | os.PathLike) -> Path:
    """A path that knows where it lies: pathlib's if that is this machine, else epath's, which has the same methods.

    Raises:
        UserError: the package that reads and writes there is not installed, or there is none.
    """
    if is_local(path):
        return Path(path)
    try:
        fsspec.get_filesystem_class(os.fspath(path).partition("://")[0])
        return epath.Path(path)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise UserError(f"{os.fspath(path)}: {first_line(error)}") from error


def is_local(path: str | os.PathLike) -> bool:
    """Whether files can be appended to and renamed there; object stores write whole files, at once."""
    return "://" not in os.fspath(path)


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
        return path.read_bytes()
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
            path.write_bytes(data)
            return
        draft = path.with_name(path.name + ".tmp")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError:  # a full disk: nothing half-written remains
            draft.unlink(missing_ok=True)
            raise


SEAL = frozenset({"sealed", "checksum"})
"""The keys of a JSON object that `sealed` adds: two, so that no damage to one of them hides the other."""


def json_hash(values: Any) -> str:
    """SHA-256 of values that are, or become, JSON; the same whatever the order of their keys."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any], decides: Callable[[Any], Any] = dict) -> dict[str, Any]:
    """A JSON object with a checksum of itself, or of what ``decides`` returns of it, in place of an earlier one."""
    plain = {key: value for key, value in values.items() if key not in SEAL}
    return {**plain, "sealed": True, "checksum": json_hash(decides(plain))}


def opened(values: Any, where: str | os.PathLike, decides: Callable[[Any], Any] = dict) -> dict[str, Any]:
    """What was sealed, after comparing its checksum. Objects from before there were checksums are taken as they are.

    Raises UserError, naming ``where`` it lies, when it is no JSON object or not what was sealed.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{os.fspath(where)}: expected a JSON object")
    rest = {key: value for key, value in values.items() if key not in SEAL}
    old = len(rest) == len(values)
    if not old and (values.get("sealed") is not True or values.get("checksum") != json_hash(decides(rest))):
        raise UserError(f"{os.fspath(where)} is damaged: it is not what was written, as its checksum differs")
    return rest
