"""What a training reports while it runs: metrics.jsonl, boards, a progress bar and lines on stderr."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from metacanvas_jax.errors import UserError
from metacanvas_jax.report.pictures import Picture
from metacanvas_jax.train.boards import Boards, Guarded
from metacanvas_jax.train.metrics import Meter, Writer, memory_gib, model_flops_utilisation

run = logging.getLogger("metacanvas_jax.run")  # to the log file of a run (`launch/run_log.py`)

SHOWN = ("loss", "samples_per_second", "mfu")


class Log:
    """The reports of a run of ``steps`` steps that begins after step ``done``; process 0 alone writes them.

    The FLOPs of the steps and the ``peak`` FLOP/s of a device give the MFU; it is left out where the peak is not known.
    A failure of one of the ``boards`` is one warning; a failure of ``metrics.jsonl``, from which a run continues, is an
    error.
    As a context manager it closes its files; after an error of the training, an error of the closing is ignored.
    """

    def __init__(
        self,
        workdir: Path,
        done: int,
        steps: int,
        devices: int,
        *,
        progress: bool = True,
        peak: float | None = None,
        boards: Boards,
    ):
        self._chief = jax.process_index() == 0
        self._meter, self._devices, self._peak, self._compiled = Meter(), devices, peak, 0.0
        self._writer = Writer(workdir, done) if self._chief else None
        hidden = not (progress and self._chief)
        self._bar = tqdm(total=steps, initial=done, unit="step", file=sys.stderr, disable=hidden)
        self._bar.set_description("compiling")
        made = boards.items() if self._chief else ()
        self._boards = [Guarded(name, partial(make, workdir, done), self.note) for name, make in made]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for board in self._boards:
            board.close()
        with contextlib.suppress(*([] if kind is None else [UserError])):
            if self._writer is not None:
                self._writer.close()

    def tick(self, samples: int, flops: float = 0.0) -> None:
        """One more step, of so many samples and FLOPs of all processes together, is complete."""
        self._meter.tick(samples, flops)
        self._bar.set_description("training", refresh=False)
        self._bar.update()

    def doing(self, what: str) -> None:
        """What the run does now beside its steps, in front of the bar until the next step."""
        self._bar.set_description(what)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        with self._meter.paused():
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is waiting for data."""
        with self._meter.waiting():
            yield

    def compiled(self, seconds: float) -> None:
        """A program was compiled, which is reported with the next metrics."""
        self._compiled += seconds

    def progress(self, step: int, metrics: Mapping[str, float], learning_rate: float) -> None:
        """Writes the metrics of a step with the speed since the last time."""
        row = dict(metrics)
        if (rates := self._meter.read()) is not None:
            row |= {"steps_per_second": rates.steps, "samples_per_second": rates.samples, "data_wait": rates.data_wait}
            if self._peak is not None:
                row["mfu"] = model_flops_utilisation(rates.flops, 1.0, self._peak, self._devices)
        if (memory := memory_gib(jax.local_devices()[0])) is not None:
            row["memory_gib"] = memory
        if self._compiled:
            row["compile_seconds"], self._compiled = self._compiled, 0.0
        self.write(step, row | {"learning_rate": learning_rate})
        self._bar.set_postfix({name: f"{row[name]:.4g}" for name in SHOWN if name in row}, refresh=False)

    def write(self, step: int, found: Mapping[str, float | Picture] | None) -> None:
        """One record. Numbers go to ``metrics.jsonl`` and the boards, pictures (uint8 arrays) to the boards."""
        if self._writer is None or not found:
            return
        pictures = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in found.items() if name not in pictures}
        if scalars:
            self._writer.write(step, scalars)
        for board in self._boards:
            board.write(step, scalars, pictures)

    def note(self, text: str) -> None:
        """A line on stderr, above the bar, and in the log of the run."""
        if self._chief:
            run.info("%s", text)
            tqdm.write(text, file=sys.stderr)

    def flush(self) -> None:
        """Everything written so far survives the machine."""
        if self._writer is not None:
            self._writer.flush()
        for board in self._boards:
            board.flush()
