"""Traces of some steps of a training, for TensorBoard's profiler and XProf."""

import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path

import jax

from metacanvas_jax import files
from metacanvas_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps ``start`` to ``stop``, both included, counted from 1 over all restarts of a run."""

    start: int
    stop: int

    def __post_init__(self):
        if not 1 <= self.start <= self.stop:
            raise UserError(f"--profile {self.start}:{self.stop}: expected START:STOP with 1 <= START <= STOP")


def parse_steps(text: str) -> Steps:
    """``START:STOP``. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise UserError(f"--profile {text!r}: expected START:STOP, the first and the last step to trace, as in 20:24")
    return Steps(int(match.group(1)), int(match.group(2)))


class Profiler:
    """Traces ``steps`` of this process into ``workdir/profile`` (``steps`` None: nothing); a context manager.

    The trace shows the number of each step. Beside it, ``memory_after_STEP_process_N.prof`` lists what used device
    memory after the last traced step (``pprof`` reads it).
    """

    def __init__(self, workdir: Path, steps: Steps | None):
        self._folder, self._steps = workdir / "profile", steps
        self._near: tempfile.TemporaryDirectory | None = None
        self._tracing, self._last = False, 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._tracing and kind is None:  # the training ended before STOP
            self.end()
        elif self._tracing:
            jax.profiler.stop_trace()

    def begin(self, now: int) -> contextlib.AbstractContextManager:
        """Starts the trace if it begins with step ``now``; the result encloses the dispatch of the step."""
        if self._steps is not None and now == self._steps.start:
            if not files.is_local(self._folder):  # the profiler writes files of its own
                self._near = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder if self._near is None else self._near.name)
            self._tracing = True
        self._last = now
        return jax.profiler.StepTraceAnnotation("train", step_num=now)

    def ends(self, now: int) -> bool:
        """Whether step ``now`` is the last one to trace."""
        return self._tracing and self._steps is not None and now == self._steps.stop

    def end(self) -> None:
        """Writes what was traced. The steps must have run, not only been started.

        Raises:
            UserError: it cannot be written.
        """
        self._tracing = False
        with files.writing(self._folder):
            jax.profiler.stop_trace()
        name = f"memory_after_{self._last}_process_{jax.process_index()}.prof"
        files.write(self._folder / name, jax.profiler.device_memory_profile())
        if self._near is not None:
            near = Path(self._near.name)
            for path in filter(Path.is_file, near.rglob("*")):
                files.write(self._folder / path.relative_to(near), path.read_bytes())
            self._near.cleanup()
