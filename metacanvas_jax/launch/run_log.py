"""The log file of a run: what it says at its start, its notes and warnings, and the error it ends with."""

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.errors import Preempted, Unreachable, UserError

FILE = "log.txt"
LOG_BYTES = 1 << 28
RUN = logging.getLogger("metacanvas_jax.run")
"""What a run says beside warnings: it goes to the file of the run alone, as it is on stderr already."""


class RunLog(logging.Handler):
    """Appends lines with their time to a file; where that is in a bucket, it is written anew with every line.

    A file that cannot be written is no reason to end a training: the lines are then on stderr alone.
    """

    def __init__(self, path: Path):
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._path, self._local = path, files.is_local(path)
        self._pending: list[str] = []
        self._writing = threading.Lock()
        with contextlib.suppress(OSError, UserError, Unreachable):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._text = io.StringIO()
            if not self._local and path.exists():
                self._text.write(files.read_text(path, LOG_BYTES))

    def handle(self, record: logging.LogRecord) -> bool:
        """Takes no lock: while a line goes to a bucket, the thread that sends it may log, and would wait for ever."""
        kept = bool(self.filter(record))
        if kept:
            self.emit(record)
        return kept

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or several of a traceback. What is said while another line is written goes with the next one."""
        if record.levelno < logging.WARNING and record.name != RUN.name:
            return
        self._pending.append(self.format(record) + "\n")
        if not self._writing.acquire(blocking=False):
            return
        try:
            lines, self._pending = "".join(self._pending), []
            self._write(lines)
        finally:
            self._writing.release()

    def _write(self, lines: str) -> None:
        with contextlib.suppress(OSError, UserError, Unreachable):
            if self._local:
                with self._path.open("a") as file:
                    file.write(lines)
                return
            self._text.write(lines)
            files.write(self._path, self._text.getvalue())


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """While open, notes of the run and all warnings go to ``folder/log.txt`` too, and the error that ends the context.

    A mistake of the user is one line, another error comes with its traceback.
    """
    kept, shown = RunLog(folder / FILE), logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING)  # as logging does by itself where no handler is set
    root = logging.getLogger()
    handlers = [(root, kept), (RUN, kept), *([] if root.handlers else [(root, shown)])]
    RUN.propagate = False
    RUN.setLevel(logging.INFO)
    for logger, handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except (UserError, Unreachable, Preempted) as error:
        _to_file(kept, logging.WARNING, str(error))
        raise
    except KeyboardInterrupt:
        _to_file(kept, logging.WARNING, "interrupted")
        raise
    except Exception as error:
        _to_file(kept, logging.ERROR, f"ended by {type(error).__name__}", error)
        raise
    finally:
        for logger, handler in handlers:
            logger.removeHandler(handler)
        RUN.setLevel(logging.NOTSET)
        RUN.propagate = True


def _to_file(log: RunLog, level: int, text: str, error: Exception | None = None) -> None:
    """A line that the command line prints by itself."""
    trace = None if error is None else (type(error), error, error.__traceback__)
    log.emit(logging.LogRecord(RUN.name, level, "", 0, text, None, trace))
