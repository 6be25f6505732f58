"""Errors a user can act on."""

import os
import re


class UserError(ValueError):
    """Bad input from outside (config, file, prompt): one line that names it and says what was expected.

    The command line prints the message without a traceback and exits with code 2.
    """


def first_line(error: BaseException, limit: int = 160) -> str:
    """What an error of a library says, as a part of one line: its first line, cut after ``limit`` characters.

    Where tensorstore names the error of the operating system after a long path, only that error's text is kept.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if code := re.search(r"\[os_error_code='(\d+)'\]", line):
        return os.strerror(int(code[1]))
    return line[:limit]


class Preempted(Exception):
    """A run that was asked to stop (SIGTERM, or its machines are being taken back) and has saved everything.

    The command line prints the message and exits with ``RESTART``; the same command then goes on where it stopped.
    """


class Unreachable(Exception):
    """Storage that gave no answer in any of several tries: a bucket, a network disk, the way to one.

    It says nothing about the files themselves. The command line prints the message and exits with ``RESTART``.
    """


class Lost(UserError):
    """Other processes of the run are gone, or did not come: nothing is wrong with the command itself.

    The command line prints the message and exits with ``RESTART``.
    """


RESTART = 75
"""Exit code of what a restart of the same command mends (EX_TEMPFAIL): preemption, a process that was lost, storage
that does not answer."""


def exit_code(error: BaseException) -> int:
    """The exit code of a command, or of a process among several, that ends with an error (docs/operations.md)."""
    if isinstance(error, Preempted | Unreachable | Lost):
        return RESTART
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
