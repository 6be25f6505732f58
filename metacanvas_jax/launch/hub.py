"""The Hugging Face hub, by its own library. `metacanvas fetch` is the only command that asks it for anything."""

import contextlib
import dataclasses
import fnmatch
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from metacanvas_jax import files
from metacanvas_jax.errors import Unreachable, UserError, first_line
from metacanvas_jax.weights.safetensors_io import PICKLES

_WEIGHTS = re.compile(r"(?P<stem>.*/|)(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; ``id`` is the SHA-256 of a ``large`` one (Git LFS), else git's id of the contents."""

    name: str
    size: int
    id: str
    large: bool


def commit(repository: str, revision: str, kind: str) -> str:
    """The commit of a revision. Raises UserError as ``listing`` does."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    with _asked(repository, revision):
        return str(_api().repo_info(repository, revision=revision, repo_type=kind).sha)


def listing(repository: str, revision: str, kind: str) -> list[RemoteFile]:
    """All files of a repository, by name.

    Raises:
        UserError: the hub cannot be reached, or has no such repository or revision for this user.
    """
    with _asked(repository, revision):
        entries = list(_api().list_repo_tree(repository, revision=revision, repo_type=kind, recursive=True))
    found = [entry for entry in entries if isinstance(entry, RepoFile)]
    rows = [RemoteFile(e.path, e.size, e.lfs.sha256 if e.lfs else e.blob_id, e.lfs is not None) for e in found]
    return sorted(rows, key=lambda row: row.name)


def matching(found: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """The files that one of the patterns names (``*`` stays in one folder), one set of weights in each folder.

    Where a folder has the same weights in several precisions, it is the set without a name for its own. Pickles are
    left out: they are never read.
    """
    readable = [file for file in found if not file.name.endswith(PICKLES)]
    chosen = [file for file in readable if any(_matches(file.name, pattern) for pattern in patterns)]
    plain = {match["stem"] for file in chosen if (match := _WEIGHTS.fullmatch(file.name))}
    single = {stem for stem in plain for file in chosen if _single(file.name, stem)}
    kept = []
    for file in chosen:
        stem = file.name[: file.name.rfind("/") + 1]
        weights = file.name.endswith(".safetensors") or ".safetensors.index" in file.name
        if weights and stem in single and not _single(file.name, stem):
            continue
        if weights and stem in plain and not _WEIGHTS.fullmatch(file.name):
            continue
        kept.append(file)
    return kept


def _single(name: str, stem: str) -> bool:
    return name in (f"{stem}model.safetensors", f"{stem}diffusion_pytorch_model.safetensors")


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def download(repository: str, revision: str, kind: str, name: str, place: str) -> None:
    """Brings one file into the folder ``place``, local or in a bucket.

    Raises:
        UserError: the hub refuses it, or it cannot be written.
        Unreachable: the connection ended.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    with contextlib.ExitStack() as stack:
        far = not files.is_local(place)
        near = stack.enter_context(tempfile.TemporaryDirectory(prefix="metacanvas-")) if far else place
        with _broken(repository, name, place), _refused(repository, revision):
            _api().hf_hub_download(repository, name, revision=revision, repo_type=kind, local_dir=files.folder(near))
        if far:
            files.upload(Path(near) / name, files.join(place, name))


def clean(place: str) -> None:
    """Removes what the library writes beside the files while it brings them."""
    if files.is_local(place):
        files.remove(files.join(place, ".cache/huggingface"))
        with contextlib.suppress(OSError):
            (files.folder(place) / ".cache").rmdir()


def offline() -> bool:
    """Whether the user forbids to ask the hub (HF_HUB_OFFLINE)."""
    return constants.is_offline_mode()


def _api() -> HfApi:
    return HfApi(endpoint=constants.ENDPOINT)


@contextlib.contextmanager
def _asked(repository: str, revision: str) -> Iterator[None]:
    """Errors of a question to the hub as a UserError of one line."""
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        with _refused(repository, revision), _without_retries():
            yield
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(f"{page} cannot be reached ({first_line(error)})") from error


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """Does not show the library's warnings: one for each time that it asks again, and each is shown twice."""
    own = logging.getLogger("huggingface_hub")
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)


@contextlib.contextmanager
def _refused(repository: str, revision: str) -> Iterator[None]:
    """What the hub refuses as a UserError of one line."""
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{repository}: accept its terms at {page}, then log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{repository}: not at {page}, or not for this user (`hf auth login`)") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError("the hub is not asked, as HF_HUB_OFFLINE is set") from error


@contextlib.contextmanager
def _broken(repository: str, name: str, place: str) -> Iterator[None]:
    """Errors on the way: those of this machine's disk as UserError, all others as Unreachable."""
    try:
        yield
    except (OSError, errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise UserError(f"cannot write {files.join(place, name)}: {error.strerror}") from error
        raise Unreachable(f"{repository}: {name} did not arrive ({first_line(error)})") from error
