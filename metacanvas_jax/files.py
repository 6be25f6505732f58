"""Small files of a run, in a local folder or under ``gs://`` and the like (through etils.epath and fsspec)."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from metacanvas_jax.errors import UserError

LONGEST_NAME = 240  # bytes of a file's name that file systems take, with room for the ending of a draft


def folder(path: str | os.PathLike) -> Path:
    """A path that knows where it lies: pathlib's if that is this machine, else epath's, which has the same methods.

    Raises:
        UserError: the package that reads and writes there is not installed, or there is none.
    """
    if is_local(path):
        return Path(path)
    try:
        fsspec.get_filesystem_class(os.fspath(path).partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: {error}") from error
    return epath.Path(path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether files can be appended to and renamed there; object stores write whole files, at once."""
    return "://" not in os.fspath(path)


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
    """A JSON object with a checksum of itself, or of what ``decides`` returns of it."""
    return {**values, "sealed": True, "checksum": json_hash(decides(values))}


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
