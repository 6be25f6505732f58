"""What `metacanvas fetch` brings: the repositories of the folders that a config names, file by file."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import folders, weight_folders
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.launch import hub
from metacanvas_jax.weights import repositories
from metacanvas_jax.weights.repositories import Repository

RECORD = "fetched.json"  # in the folder of a repository: its name, its commit and the ids of the files
NETWORK = ("*.json", "*.safetensors", "*.txt", "LICENSE*")  # of a repository that is one network
PIPELINE = ("model_index.json", "scheduler/*", "LICENSE*")  # of a pipeline, besides the folders that are read


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A repository to bring into the folder ``place``: the files that match ``patterns``.

    ``serves`` are the parts of the model, or "data", that are read from it.
    """

    repository: Repository
    place: str
    patterns: tuple[str, ...]
    serves: tuple[str, ...]

    def file(self, name: str) -> str:
        """Where a file of the repository is put."""
        return files.join(self.place, name)


def of_config(experiment: Experiment, *, data: bool = False, out: str = "") -> tuple[list[Wanted], list[str]]:
    """What a config needs: the repositories of its weights and tokenizers, with ``data`` those of its sources too.

    They are put where the config looks for them, or into ``out``. The second result are folders of the config that no
    repository is known for, each with its part.
    """
    named = [(part, path, _subfolder(experiment, part)) for part, path in folders(experiment).items() if path]
    named += [("data", source.path, "") for source in experiment.sources if data and source.path]
    chosen: dict[str, Wanted] = {}
    unknown = []
    for part, path, subfolder in named:
        known = repositories.found(path)
        if known is None:
            unknown.append(f"{part}: {path}")
            continue
        repository, base, rest = known
        place = files.join(out or base, repository.folder)
        before = chosen.get(place, Wanted(repository, place, (), ()))
        patterns = before.patterns + _patterns(repository, [rest or subfolder] if repository.folders else [rest])
        serves = tuple(dict.fromkeys((*before.serves, part)))
        chosen[place] = Wanted(repository, place, tuple(dict.fromkeys(patterns)), serves)
    return list(chosen.values()), unknown


def of_names(names: Sequence[str], out: str) -> list[Wanted]:
    """What of whole repositories is read here, each put into its folder below ``out``.

    Raises UserError for a name that is not in the table.
    """
    chosen = []
    for name in names:
        repository = repositories.REPOSITORIES.get(name.rpartition("/")[2])
        if repository is None:
            raise UserError(f"--repository {name}: expected one of {', '.join(repositories.REPOSITORIES)}")
        patterns = _patterns(repository, repository.folders or [""])
        chosen.append(Wanted(repository, files.join(out, repository.folder), patterns, ()))
    return chosen


def _subfolder(experiment: Experiment, part: str) -> str:
    """Where a pipeline of diffusers keeps a part."""
    if part in ("mllm.tokenizer", "text.tokenizer"):
        return "tokenizer"
    source = weight_folders(experiment).get(part)
    return "" if source is None else source.network.subfolder


def _patterns(repository: Repository, inside: Sequence[str]) -> tuple[str, ...]:
    if repository.kind == "dataset":
        return tuple(rest or "*" for rest in inside)
    if not repository.folders:
        return NETWORK
    return (*(f"{folder}/*" for folder in inside), *PIPELINE)


@dataclasses.dataclass(frozen=True)
class Found:
    """A repository as the hub has it: the commit, its files that are wanted, and those of them that are missing."""

    wanted: Wanted
    commit: str
    files: tuple[hub.RemoteFile, ...]
    missing: tuple[hub.RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the missing files."""
        return sum(file.size for file in self.missing)


def look(wanted: Wanted, revision: str = "") -> Found:
    """Asks the hub for the files, and compares them with those that are there; ``revision`` replaces that of the table.

    Raises:
        UserError: the hub cannot be reached or refuses, or a file is missing there.
    """
    repository = wanted.repository
    asked = revision or repository.revision or _recorded(wanted).get("revision", "") or "main"
    commit = hub.commit(repository.name, asked, repository.kind)
    chosen = hub.matching(hub.listing(repository.name, commit, repository.kind), wanted.patterns)
    if not chosen:
        raise UserError(f"{repository.name} at {commit[:12]} has no file that is {' or '.join(wanted.patterns)}")
    known = _recorded(wanted).get("files", {})
    missing = tuple(file for file in chosen if not _there(wanted.file(file.name), file, known.get(file.name)))
    return Found(wanted, commit, tuple(chosen), missing)


def bring(found: Found, say: Callable[[str], None] = print) -> None:
    """Brings what is missing, one file after another; each is compared with its hash at the hub.

    A connection that breaks is made again and goes on where it stopped.

    Raises:
        UserError: the hub refuses, or the place cannot be written or is too small.
        Unreachable: the connection ended, or a file arrived damaged; the same command goes on.
    """
    wanted, repository = found.wanted, found.wanted.repository
    record = {"repository": repository.name, "revision": found.commit, "files": {}}
    record["files"] = {file.name: file.id for file in found.files if file not in found.missing}
    for number, file in enumerate(found.missing, start=1):
        say(f"{wanted.file(file.name)}  {size_text(file.size)}  ({number} of {len(found.missing)})")
        hub.download(repository.name, found.commit, repository.kind, file.name, wanted.place)
        if content_id(wanted.file(file.name), file) != file.id:
            files.remove(wanted.file(file.name))
            raise Unreachable(f"{wanted.file(file.name)}: what arrived is not what {repository.name} holds")
        record["files"][file.name] = file.id
        files.write(files.folder(wanted.file(RECORD)), json.dumps(record, indent=2) + "\n")
    files.write(files.folder(wanted.file(RECORD)), json.dumps(record, indent=2) + "\n")
    hub.clean(wanted.place)


def check_room(found: Sequence[Found]) -> None:
    """Raises UserError where a disk has not enough room for all that is missing; of a bucket nothing is known."""
    needed: dict[Path, int] = {}
    for one in found:
        if files.is_local(one.wanted.place):
            place = files.folder(one.wanted.place).absolute()
            there = next(folder for folder in (place, *place.parents) if folder.exists())
            needed[there] = needed.get(there, 0) + one.size
    for place, size in needed.items():
        if (free := shutil.disk_usage(place).free) < size:
            raise UserError(f"{place}: {size_text(size)} are needed, {size_text(free)} are free")


def content_id(path: str, file: hub.RemoteFile) -> str:
    """The id that the hub would give the contents of a file: SHA-256 of a large one, git's blob id of another."""
    digest = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % files.size(path))
    with files.stream(path, block=1 << 24) as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def size_text(size: int) -> str:
    """Bytes in words, decimal as a shop for disks counts them."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"


def _there(path: str, file: hub.RemoteFile, recorded: str | None) -> bool:
    """Whether a file is there as the hub has it; what `metacanvas fetch` did not write itself is read whole."""
    try:
        if files.size(path) != file.size:
            return False
    except OSError:
        return False
    return file.id == (recorded or content_id(path, file))


def _recorded(wanted: Wanted) -> dict:
    path = files.folder(wanted.file(RECORD))
    return files.read_json(path) if path.exists() else {}
