"""Which errors of storage pass by themselves, and calls that are tried again until they have passed.

A bucket that is busy, a connection that breaks and a network disk that is away for a moment say nothing about the
file. Such a call is made again, with waiting times that double. What still fails after `ATTEMPTS` is `Unreachable`,
which ends a command with the exit code of a restart. A file that is missing or may not be read is never tried again.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from metacanvas_jax.errors import Unreachable, UserError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "ESTALE", "ETIMEDOUT", "EPIPE", "ENOBUFS", "EREMOTEIO", "ENOLINK"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENETDOWN", "ENETRESET", "ENETUNREACH"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN"),
    )
    if hasattr(errno, name)
)
_CLIENTS = frozenset({"aiohttp", "requests", "urllib3", "botocore", "azure"})
"""Packages whose errors of a connection have no number of the operating system."""
_CODES = frozenset({401, 408, 409, 425, 429, *range(500, 600)})
"""Answers of a bucket that pass: busy, out of order, and 401, which a token that just ran out gives."""


_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
"""What the messages of tensorstore, which reads and writes checkpoints, begin with when a bucket does not answer."""


def passes(error: BaseException) -> bool:
    """Whether an error of storage says nothing about the file itself."""
    if isinstance(error, UserError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    code = _code(error)
    if code is not None:
        return code in _CODES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if isinstance(error, ValueError) and str(error).startswith(_STATUSES):
        return True
    package = type(error).__module__.partition(".")[0]
    return package in _CLIENTS or (package, type(error).__name__) == ("gcsfs", "ChecksumError")


def retried(
    call: Callable[[], T], where: str | os.PathLike, *, attempts: int | None = None, wait: Callable = time.sleep
) -> T:
    """What ``call`` returns, after as many tries as it takes; ``where`` names the file in messages.

    Errors that do not pass are raised as they are. ``attempts`` is `ATTEMPTS` unless given.

    Raises:
        Unreachable: the last of ``attempts`` tries failed like those before it.
    """
    attempts = ATTEMPTS if attempts is None else attempts
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
            if attempt == attempts:
                raise Unreachable(f"{os.fspath(where)}: no answer in {attempts} tries ({first_line(error)})") from error
            pause = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            logger.warning("%s: %s; tried again in %.1f s", os.fspath(where), first_line(error), pause)
            wait(pause)
    raise ValueError(f"attempts is {attempts}, expected at least 1")


def _code(error: BaseException) -> int | None:
    """The HTTP status that an error of gcsfs (``code``) or aiohttp (``status``) carries."""
    if type(error).__module__.partition(".")[0] not in {"gcsfs", *_CLIENTS}:
        return None
    value = getattr(error, "code", None) or getattr(error, "status", None)
    return int(value) if str(value).isdigit() and int(value) else None
