"""Warnings on the terminal: one line each, above a progress bar if there is one."""

import contextlib
import logging
import sys
from collections.abc import Iterator


class Lines(logging.Handler):
    """Writes ``warning: MESSAGE`` on stderr, with the traceback where a record has one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """While open, warnings of all libraries are shown so, unless the process shows them already."""
    root, lines = logging.getLogger(), Lines(logging.WARNING)
    used = not root.handlers  # a library that calls basicConfig later then adds nothing
    if used:
        root.addHandler(lines)
    try:
        yield
    finally:
        if used:
            root.removeHandler(lines)
