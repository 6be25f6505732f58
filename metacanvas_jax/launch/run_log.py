"""The log file of a run: what it says at its start, its notes and warnings, and the error it ends with."""

import contextlib
import io
import logging
import sys
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
        with contextlib.suppress(OSError, UserError, Unreachable):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._text = io.StringIO()
            if not self._local and path.exists():
                self._text.write(files.read_text(path, LOG_BYTES))

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or several of a traceback."""
        if record.levelno < logging.WARNING and record.name != RUN.name:
            return
        line = self.format(record) + "\n"
        with contextlib.suppress(OSError, UserError, Unreachable):
            if self._local:
                with self._path.open("a") as file:
                    file.write(line)
                return
            self._text.write(line)
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
