"""The roll call at start-up: which processes are running, and which are missing.

JAX's own start-up waits for all processes and aborts at its time limit without naming the missing ones. Therefore
process 0 first listens on the coordinator's port itself until all others have reported, then gives the port to JAX.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence

from metacanvas_jax.errors import Lost, UserError

LATE, HELD = "did not come up", os.strerror(errno.EADDRINUSE)
"""Words of the verdicts that a restart mends: processes that are late, and a port that is not free yet."""

_PATIENCE = 5.0
"""Seconds for one line to come over an open connection, and beyond the time-out for the verdict to come."""


def answer(coordinator: str, count: int, process: int, timeout_s: float) -> None:
    """Returns when all of ``count`` processes have called this with the same ``coordinator`` (host:port of process 0).

    Raises:
        Lost: after ``timeout_s``, naming the processes that are missing; at once if an earlier process of this machine
            still holds the port.
        UserError: two say that they are the same one, or expect different numbers.
    """
    host, _, port = coordinator.rpartition(":")
    if not port.isdigit():
        raise UserError(f"coordinator {coordinator!r}: expected host:port")
    if process == 0:
        verdict = _listen(int(port), count, timeout_s)
    else:
        who = f"{process} of {count} on {socket.gethostname()}"
        verdict = _report((host.strip("[]"), int(port)), who, timeout_s)
    if verdict != "all here":
        raise (Lost if LATE in verdict or HELD in verdict else UserError)(verdict)


def listed(processes: Sequence[int], limit: int = 16) -> str:
    """ "process 3", "processes 1, 4 and 7"; at most ``limit`` of them by number."""
    if len(processes) == 1:
        return f"process {processes[0]}"
    if len(processes) > limit:
        return f"processes {', '.join(map(str, processes[:limit]))} and {len(processes) - limit} more"
    return f"processes {', '.join(map(str, processes[:-1]))} and {processes[-1]}"


def _listen(port: int, count: int, timeout_s: float) -> str:
    """The verdict on all processes, which every present process gets."""
    end = time.monotonic() + timeout_s
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(port))
        except OSError as error:
            return f"process 0 cannot listen on port {port}: {error.strerror or error}"
        verdict = ""
        while len(here) < count - 1 and not verdict:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = listed(sorted(set(range(1, count)) - here.keys()))
                verdict = f"{missing} of {count} {LATE} within {timeout_s:g} s"
                break
            stack.enter_context(connection)
            verdict = _admit(connection, here, count)
        verdict = verdict or "all here"
        for connection in here.values():
            with contextlib.suppress(OSError):  # who has left meanwhile will be missed by JAX
                connection.sendall(f"{verdict}\n".encode())
    return verdict


def _admit(connection: socket.socket, here: dict[int, socket.socket], count: int) -> str:
    """Notes who has come; returns what is wrong with it, or nothing."""
    words = _line(connection).split()
    if len(words) != 5 or not words[0].isdigit() or words[1] != "of":
        return ""  # a stranger, such as a port scan
    process, expected, host = int(words[0]), words[2], words[4]
    if expected != str(count):
        return f"process 0 expects {count} processes, process {process} on {host} expects {expected}"
    if not 0 < process < count:
        return f"{host} says that it is process {process} of {count}, expected 1 to {count - 1}"
    if process in here and _connected(here[process]):
        return f"two processes say that they are process {process}, one of them on {host}"
    here[process] = connection
    return ""


def _report(address: tuple[str, int], who: str, timeout_s: float) -> str:
    """The verdict of process 0."""
    end, reason = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, timeout=_PATIENCE) as connection:
                connection.sendall(f"{who}\n".encode())
                verdict = _line(connection, max(end - time.monotonic(), 0) + _PATIENCE)
                if verdict:
                    return verdict
        except OSError as error:  # process 0 is not up yet, or its name is not known yet
            reason = f": {error.strerror or error}"
        time.sleep(0.2)
    return f"process 0 {LATE} at {address[0]}:{address[1]} within {timeout_s:g} s{reason} (this is process {who})"


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _line(connection: socket.socket, timeout_s: float = _PATIENCE) -> str:
    """One line, without its end; empty if none comes in time."""
    connection.settimeout(timeout_s)
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 1000:
            part = connection.recv(1000)
            if not part:
                break
            data += part
    return data.decode(errors="replace").strip() if data.endswith(b"\n") else ""


def _connected(connection: socket.socket) -> bool:
    """Whether the other side is still there; it sends nothing more, so anything to read is its end."""
    connection.settimeout(0.01)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False
