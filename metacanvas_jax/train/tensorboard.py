"""A training in TensorBoard: curves in groups, pictures, texts."""

import os
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import text as text_summary

from metacanvas_jax import files
from metacanvas_jax.report.pictures import Picture, png
from metacanvas_jax.train.boards import grouped

EVERY_S = 10.0


class TensorBoard:
    """Event files in ``folder/tensorboard``; each process of a run writes its own.

    What an earlier process showed beyond ``resume`` is hidden. ``texts`` are shown as they are, by name. An object
    store cannot append: there the file is written completely at every ``flush``. Elsewhere it is updated every
    ``EVERY_S`` seconds.
    """

    def __init__(self, folder: str | os.PathLike, resume: int = 0, *, texts: Mapping[str, str] | None = None):
        self._folder = board = files.folder(folder) / "tensorboard"
        self._near = None if files.is_local(board) else tempfile.TemporaryDirectory()
        board = board if self._near is None else Path(self._near.name)
        board.mkdir(parents=True, exist_ok=True)
        # Its SummaryWriter writes from a thread, where an error is lost and the next call hangs.
        self._events, self._shown = EventsWriter(str(board / "events"), f".{resume}"), -EVERY_S
        self._event(resume + 1, session_log=SessionLog(status=SessionLog.START))
        for name, text in (texts or {}).items():
            self._event(resume, summary=text_summary(name, textwrap.indent(text, "    ")))  # as Markdown shows code

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        """Scalars by group, and pictures."""
        values = [Summary.Value(tag=grouped(name), simple_value=value) for name, value in scalars.items()]
        for name, picture in pictures.items():
            height, width = picture.shape[:2]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(picture))
            values.append(Summary.Value(tag=name, image=image))
        self._event(step, summary=Summary(value=values))
        if self._near is None and time.monotonic() - self._shown >= EVERY_S:
            self.flush()
            self._shown = time.monotonic()

    def flush(self) -> None:
        """Everything written so far lies in the folder."""
        self._events.flush()
        if self._near is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in Path(self._near.name).iterdir():
                files.write(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        self._events.close()
        if self._near is not None:
            self._near.cleanup()

    def _event(self, step: int, **fields: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **fields))
