"""The public repositories of weights and data on the Hugging Face hub, and which of them a folder holds.

A folder that configs name ends with the last part of a repository's name, and perhaps a subfolder:
``weights/NAME/transformer``. The table is ``configs/repositories.json``.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Literal

from metacanvas_jax import files
from metacanvas_jax.files import ROOT


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    ``name`` is OWNER/NAME. ``revision`` is the commit that is brought (empty: the newest of the branch ``main``, which
    `metacanvas fetch` writes down). ``licence`` names the terms. ``folders`` are the subfolders of a pipeline that are
    read here; a repository of one network, or of data, has none.
    """

    name: str
    revision: str
    licence: str
    folders: Sequence[str] = ()
    kind: Literal["model", "dataset"] = "model"

    def __post_init__(self) -> None:
        """Raises ValueError for a name without an owner, and for a revision that is no commit."""
        if self.name.count("/") != 1:
            raise ValueError(f"name is {self.name!r}, expected OWNER/NAME")
        if not re.fullmatch(r"([0-9a-f]{40})?", self.revision):
            raise ValueError(f"revision is {self.revision!r}, expected the 40 digits of a commit, or nothing")

    @property
    def folder(self) -> str:
        """The last part of the name, which the folder on disk has too."""
        return self.name.partition("/")[2]


def _read() -> dict[str, Repository]:
    rows = files.read_json(ROOT / "configs" / "repositories.json", list)
    return {row["name"].partition("/")[2]: Repository(**row) for row in rows}


REPOSITORIES = _read()
"""By the name of the folder: what ``configs/repositories.json`` lists."""


def found(path: str | os.PathLike) -> tuple[Repository, str, str] | None:
    """The repository that a path lies in, the folder that holds the repository, and the rest of the path below it."""
    parts = os.fspath(path).rstrip("/").split("/")
    for index, part in enumerate(parts):
        if part in REPOSITORIES:
            return REPOSITORIES[part], "/".join(parts[:index]), "/".join(parts[index + 1 :])
    return None


def how_to_fetch(path: str | os.PathLike) -> str:
    """How the folder of a path is brought, in words for the end of a message; "" where no repository is known for it.

    A name of the hub, OWNER/NAME, is such a path: its repository is brought into the folder OWNER.
    """
    known = found(path)
    if known is None:
        return ""
    repository, base, _ = known
    return f"`metacanvas fetch --repository {repository.folder} --out {base or '.'}` brings it"
