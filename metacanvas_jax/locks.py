"""One writer per folder: a file that names its process, whose heartbeat shows that it lives. Local, or in a bucket."""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.errors import UserError

NAME = ".lock"
BEAT_S = 10.0  # between two heartbeats
PATIENCE_S = 45.0  # how long a lock of another machine may show no heartbeat before it is taken over


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock. ``started`` and ``boot`` tell a process from a later one with the same number."""

    host: str
    pid: int
    started: str
    boot: str
    token: str  # of this lock alone
    beat: int = 0

    @property
    def gone(self) -> bool:
        """Whether this machine can tell that the process no longer runs."""
        here = _this("")
        if self.host != here.host:
            return False
        return self.boot != here.boot or _started(self.pid) != self.started


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike, *, name: str = NAME, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is missing; ``name`` is that of the file.

    The lock of a process that died on this machine is taken over at once. A lock of another machine is watched for
    ``patience_s`` seconds and taken over if no heartbeat comes. The clocks of the two machines are not compared.

    Raises:
        UserError: another process works in the folder, or the folder cannot be written.
    """
    folder = files.folder(folder)
    path, mine = folder / name, _this(secrets.token_hex(8))
    _take(folder, path, mine, patience_s)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, beat_s, ended), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        current = _read(path)
        if current is not None and current.token == mine.token:
            with contextlib.suppress(OSError):
                path.unlink()


def _take(folder: Path, path: Path, mine: Owner, patience_s: float) -> None:
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    while not _create(path, mine):
        owner = _read(path)
        if owner is None:  # released just now, or damaged: only a heartbeat would show that somebody is there
            time.sleep(min(1.0, patience_s))
            owner = _read(path)
        lives = owner is not None and not owner.gone
        if lives and (owner.host == mine.host or _beats(path, owner, patience_s)):
            raise UserError(
                f"{folder} is in use by process {owner.pid} on {owner.host}; stop it first, or use another folder"
            )
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _beats(path: Path, owner: Owner, patience_s: float) -> bool:
    """Whether a lock shows a sign of life within ``patience_s`` seconds: a heartbeat, or another owner."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        time.sleep(min(0.5, patience_s))
        now = _read(path)
        if now is None:
            return False
        if now != owner:
            return True
    return False


def _beat(path: Path, mine: Owner, beat_s: float, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(beat_s):
        beat += 1
        with contextlib.suppress(OSError, UserError):  # a full disk shows where the folder's own files are written
            files.write(path, json.dumps(dataclasses.asdict(dataclasses.replace(mine, beat=beat))))


def _create(path: Path, owner: Owner) -> bool:
    """Writes a lock where there is none; False where there is one."""
    text = json.dumps(dataclasses.asdict(owner))
    if not files.is_local(path):  # a bucket gives no exclusive creation to all its clients: the last writer wins
        if path.exists():
            return False
        files.write(path, text)
        time.sleep(0.5)
        now = _read(path)
        return now is not None and now.token == owner.token
    with files.writing(path):
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:  # a full disk: no lock without an owner remains
            path.unlink(missing_ok=True)
            raise
    return True


def _read(path: Path) -> Owner | None:
    """The owner of a lock; None where there is no lock, or one that cannot be read."""
    try:
        return Owner(**files.read_json(path))
    except (UserError, TypeError):
        return None


def _this(token: str) -> Owner:
    return Owner(socket.gethostname(), os.getpid(), _started(os.getpid()), _boot(), token)


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; "" for one that does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _started_without_proc(pid)
    return "" if fields[0] == "Z" else fields[19]


def _started_without_proc(pid: int) -> str:
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(pid, 0)
    except OSError as error:  # of another user: it runs all the same
        return "runs" if isinstance(error, PermissionError) else ""
    return "runs"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
