"""Metrics of a training: JSON lines, throughput, memory and model FLOP utilisation."""

import collections
import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import GIB, chip_of

METRICS_BYTES = 1 << 32
Clock = Callable[[], float]


def peak_flops(device: Any) -> float | None:
    """Peak of one ``jax.Device``; None where it is not known, as on a CPU."""
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.flops


def measured_peak(dtype: str = "float32", size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s that the default device reaches on a large square matrix product: a peak where no data sheet gives one."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def memory_gib(device: Any) -> float | None:
    """The most memory that was in use on one ``jax.Device`` so far, in GiB; None where it is not known, as on a CPU."""
    found = device.memory_stats() or {}
    return found["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in found else None


def model_flops_utilisation(flops_per_step: float, seconds_per_step: float, peak: float, devices: int) -> float:
    """``flops_per_step / (seconds_per_step * peak * devices)``.

    ``flops_per_step`` counts every operation of the model once: repetitions by rematerialisation do not count, and
    frozen networks count with their forward pass only.
    """
    return flops_per_step / (seconds_per_step * peak * devices)


class Rates(NamedTuple):
    """Steps, samples and FLOPs per second, and the share of the time that went by with waiting for data."""

    steps: float
    samples: float
    flops: float
    data_wait: float


WINDOW_S = 1.0
"""Rates are those of at least so many seconds. The queue of started steps empties at a pause and at the end of a run,
so that several steps are complete at once; the rates of a single short step would say a thousand times the truth."""


class Meter:
    """Rates up to a reading, over ``WINDOW_S`` or more, without compilation and without time inside ``paused``."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._start: float | None = None
        self._sums = np.zeros(4)  # steps, samples, FLOPs, seconds of waiting
        self._read = 0.0  # steps at the last reading
        self._marks: collections.deque[tuple[float, np.ndarray]] = collections.deque()  # seconds, and the sums then

    def tick(self, samples: int, flops: float = 0.0) -> None:
        """A step of so many samples and FLOPs is complete. The first one, while memory is taken, starts the clock."""
        if self._start is None:
            self._start = self._clock()
            self._marks.append((0.0, self._sums))
        else:
            self._sums = self._sums + np.array([1, samples, flops, 0.0])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += self._clock() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is waiting for data."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._start is not None:
                self._sums = self._sums + np.array([0, 0, 0.0, self._clock() - begin])

    def read(self) -> Rates | None:
        """The rates since the newest reading that is ``WINDOW_S`` old, or the start; None if there was no new step."""
        if self._start is None or self._sums[0] == self._read:
            return None
        now = self._clock() - self._start
        while len(self._marks) > 1 and self._marks[1][0] <= now - WINDOW_S:
            self._marks.popleft()
        then, sums = self._marks[0]
        self._marks.append((now, self._sums))
        self._read = self._sums[0]
        return Rates(*((self._sums - sums) / max(now - then, 1e-9)).tolist())


class Writer:
    """Appends one JSON object per logged step to ``metrics.jsonl``.

    ``resume`` is the step from which the training continues. Records of an earlier process beyond it are dropped first,
    so that the file reads as one uninterrupted run. Values that are not finite become null, which JSON can express.
    An object store cannot append: there the file is written completely at every ``flush``. Elsewhere it is updated
    every ``every_s`` seconds; only after ``flush`` do the records survive a crash of the machine.

    Raises UserError, from any method, when it cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike, resume: int = 0, *, every_s: float = 10.0, clock: Clock = time.monotonic
    ):
        folder = files.folder(folder)
        self._every_s, self._clock, self._shown = every_s, clock, -math.inf
        self.path = folder / "metrics.jsonl"
        self._local = files.is_local(folder)
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            truncate(self.path, resume)
            if self._local:
                self._file = self.path.open("a")
            else:
                self._file = io.StringIO(self.path.read_text() if self.path.exists() else "")
                self._file.seek(0, io.SEEK_END)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One record, at the end of the file within ``every_s`` seconds if more follow, or by ``flush``."""
        record = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        with files.writing(self.path):
            self._file.write(json.dumps({"step": step} | record) + "\n")
            if self._local and self._clock() - self._shown >= self._every_s:
                self._file.flush()
                self._shown = self._clock()

    def flush(self) -> None:
        """Everything written so far survives the process, and the machine."""
        with files.writing(self.path):
            if self._local:
                self._file.flush()
                os.fsync(self._file.fileno())
            else:
                files.write(self.path, self._file.getvalue())

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        with files.writing(self.path):
            self._file.close()


def truncate(path: Path, step: int) -> None:
    """Drops the records beyond ``step`` and an incomplete last line, by writing a new file and renaming it."""
    if path.exists():
        kept = [line for line in files.read_text(path, METRICS_BYTES).splitlines() if _step_of(line) <= step]
        files.write(path, "".join(line + "\n" for line in kept))


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a run's ``metrics.jsonl``; a last line that a kill left incomplete is left out.

    Raises UserError when the file is missing, or another line is damaged.
    """
    path = files.folder(folder) / "metrics.jsonl"
    lines = files.read_bytes(path, METRICS_BYTES).decode(errors="replace").splitlines()
    for number, line in enumerate(lines[:-1], 1):
        if _step_of(line) == float("inf"):
            raise UserError(f"{path}: line {number} is damaged, expected a JSON object with a step")
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def read_scores(folder: str | os.PathLike) -> dict[str, dict[str, Any]] | None:
    """The scores of an evaluated run by split, or None; of a validation loss its means, with and without canvas.

    Raises UserError for a file that holds no scores.
    """
    path = files.folder(folder) / "scores.json"
    if not path.exists():
        return None
    scores = files.read_json(path)
    if scores.keys() == {"canvas", "bare", "samples"}:
        scores = _losses(scores, path)
    for split, found in scores.items():
        tree = found if isinstance(found, dict) else {}
        categories = tree.get("categories", {})
        numbers = categories.values() if isinstance(categories, dict) else [categories]
        if not is_number(tree.get("overall")) or not all(value is None or is_number(value) for value in numbers):
            raise UserError(f"{path}: {split} holds no scores (numbers 'overall' and, by name, 'categories')")
    return scores


def _losses(tree: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """What ``evaluate/flow_loss.py`` saves, as scores: the mean over noise levels of each task, and over tasks."""
    found = {}
    for name, title in (("canvas", "validation loss"), ("bare", "validation loss, no canvas")):
        if name == "bare" and tree[name] is None:
            continue
        tasks = tree[name] if isinstance(tree[name], dict) else {}
        means = {task: mean for task, levels in tasks.items() if (mean := _mean(levels)) is not None}
        if not tasks or means.keys() != tasks.keys():
            raise UserError(f"{path}: {name} holds no losses (numbers by task and noise level)")
        found[title] = {"overall": sum(means.values()) / len(means), "categories": means}
    return found


def _mean(levels: Any) -> float | None:
    values = list(levels.values()) if isinstance(levels, dict) else []
    return sum(values) / len(values) if values and all(map(is_number, values)) else None


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number; what was not finite is null there."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step_of(line: str) -> float:
    try:
        record = json.loads(line)
        return record["step"] if is_number(record["step"]) else float("inf")
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
