"""Runs one command and reports how it ended and the most memory that it held.

A process that replaces its program (exec) keeps the largest memory it had before in ``ru_maxrss``, and a fork begins
with the memory of its parent. The figure of a command started by a large process would thus be that process's. So this
file is also a small program, which stands between the two: it starts the command and reports what ``wait4`` says.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence


def measured(words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, float]:
    """Runs a command; its exit code (negative: the signal that ended it) and the most memory it held, in GiB.

    Ctrl-C reaches the command as well, and a termination of the program in between is passed on to it. Raises
    RuntimeError for a command that cannot be started.
    """
    reading, writing = os.pipe()
    between = [sys.executable, "-I", "-S", __file__, str(writing), *words]
    with subprocess.Popen(between, env=environment, pass_fds=(writing,)), os.fdopen(reading) as report:
        os.close(writing)
        said = report.read()
    if not said:
        raise RuntimeError(f"{words[0]}: the command was not run")
    status, kilobytes = json.loads(said)
    return os.waitstatus_to_exitcode(status), kilobytes / 2**20


def between(writing: int, words: list[str]) -> None:
    """Starts the command, waits for it and writes its status and largest memory (kB)."""
    os.set_inheritable(writing, False)
    process = subprocess.Popen(words)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command as well
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for the process again
    with os.fdopen(writing, "w") as report:
        json.dump([status, usage.ru_maxrss], report)


if __name__ == "__main__":
    between(int(sys.argv[1]), sys.argv[2:])
