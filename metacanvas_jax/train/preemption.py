"""Requests to stop a run: SIGTERM, or Cloud TPU's notice to any of the processes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from metacanvas_jax.errors import RESTART


class Interrupted(BaseException):
    """Raised inside `Preemption.interrupting`."""


class Preemption:
    """Listens while it is open as a context. After each step, ``reached`` says whether to save and leave.

    In a run of several processes JAX's preemption service listens. The first SIGTERM at any process counts for all, and
    the service finds a step that all of them reach. In a run of one process SIGTERM is caught here. Before ``begin``
    there is nothing to save, and the process ends at once, even from inside a compilation.
    """

    def __init__(self) -> None:
        self._shared = jax.process_count() > 1
        self._asked = self._begun = self._interruptible = False

    def __enter__(self) -> "Preemption":
        self._listening = not self._shared and threading.current_thread() is threading.main_thread()
        if self._listening:
            # Python runs a handler when the main thread comes back from compiled code; the pipe wakes a thread now.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._handler = signal.signal(signal.SIGTERM, self._ask)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._leave_at_once, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listening:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)

    def begin(self) -> None:
        """From now on there is something to save."""
        self._begun = True

    def reached(self, step: int) -> bool:
        """Whether to leave after this step; must be asked after every step, by all processes."""
        if self._shared:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that may be repeated later: in a single process, a request to stop raises Interrupted in it."""
        self._interruptible = True
        try:
            if self._asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
        if self._interruptible:
            self._interruptible = False  # once
            raise Interrupted

    def _leave_at_once(self) -> None:
        while (byte := os.read(self._read, 1)) != b"\0":
            if byte[0] == signal.SIGTERM and not self._begun:
                print("metacanvas: asked to stop before the first step; nothing to save", file=sys.stderr, flush=True)
                os._exit(RESTART)
