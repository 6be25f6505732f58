"""Where a training shows its metrics beside ``metrics.jsonl``: one small interface, and the groups of their names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from metacanvas_jax.errors import first_line
from metacanvas_jax.report.pictures import Picture

GROUPS = {
    **dict.fromkeys(("loss", "facts", "recall"), "loss"),
    **dict.fromkeys(("score", "accuracy"), "score"),
    **dict.fromkeys(("learning_rate", "grad_norm", "param_norm", "skipped"), "optimizer"),
    **dict.fromkeys(("samples_per_second", "steps_per_second", "mfu", "data_wait", "compile_seconds"), "speed"),
    **dict.fromkeys(("spike", "spike_above", "spike_grad_norm"), "spike"),
    "memory_gib": "memory",
}
CONSTANT = ("finite",)
"""Metrics that no board shows: a training whose loss is not finite ends, so that this one is always 1."""

NONE = ("skipped", 0.0)
"""A number of skipped batches that no board shows either: it stays so in nearly every run."""


class Board(Protocol):
    """One place that shows a training. Process 0 alone has boards."""

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        """Numbers and pictures of one step, by the names of ``metrics.jsonl``."""

    def flush(self) -> None:
        """Shows everything that was written so far."""

    def close(self) -> None:
        """The last call: shows everything, and gives back what the board holds."""


Boards = Mapping[str, Callable[[Path, int], Board]]
"""By the board's name, what makes it from the run's folder and the step from which the training continues."""


class Guarded:
    """A board whose failure stops no training: ``note`` gets one line, and the run goes on without the board."""

    def __init__(self, name: str, make: Callable[[], Board], note: Callable[[str], None]):
        self._name, self._note = name, note
        self._board: Board | None = None
        self._try(lambda: setattr(self, "_board", make()))

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        """As the board's own, without what never changes."""
        shown = {name: value for name, value in scalars.items() if name not in CONSTANT and (name, value) != NONE}
        if self._board is not None:
            self._try(lambda: self._board.write(step, shown, pictures))

    def flush(self) -> None:
        """As the board's own."""
        if self._board is not None:
            self._try(lambda: self._board.flush())

    def close(self) -> None:
        """As the board's own."""
        if self._board is not None:
            self._try(lambda: self._board.close())

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of any kind: a board writes to disks and services with libraries of others
            self._board = None
            self._note(f"warning: {self._name} shows nothing more of this run: {first_line(error)}")


def group(name: str) -> str:
    """The group of a metric: what stands before its slash, or where it belongs."""
    head, slash, _ = name.partition("/")
    by_ending = (
        "loss" if name.startswith("val_loss") else next((k for k in ("loss", "score") if name.endswith(k)), "other")
    )
    return head if slash else GROUPS.get(name, by_ending)


def grouped(name: str) -> str:
    """The metric's name with its group in front, which boards make sections of: "speed/mfu"."""
    return name if "/" in name else f"{group(name)}/{name}"
