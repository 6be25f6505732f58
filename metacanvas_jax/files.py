"""Small files of a run, in a local folder or under ``gs://`` and the like (through etils.epath and fsspec)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from metacanvas_jax.errors import UserError


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
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
