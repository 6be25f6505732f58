"""What a training does beside its steps: it evaluates and draws previews."""

from collections.abc import Callable, Mapping
from pathlib import Path

from metacanvas_jax.parallel.watch import Watch
from metacanvas_jax.report.pictures import Picture
from metacanvas_jax.train.job import Due, FitConfig
from metacanvas_jax.train.log import Log
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.preemption import Interrupted, Preemption
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.types import Params

Hook = Callable[[TrainState, Params, int], Mapping[str, float | Picture] | None]
"""``hook(state, frozen, step)``; the numbers and pictures it returns are logged. It must not keep the state, which the
next step donates."""


class Hooks:
    """The evaluation and the preview of a run; either may be None.

    A request to stop ends them at once. They are then *owed*: the checkpoint says so, and the process that continues
    the run begins with them.
    """

    def __init__(
        self,
        evaluate: Hook | None,
        preview: Hook | None,
        config: FitConfig,
        log: Log,
        watch: Watch,
        preemption: Preemption,
    ):
        self._hooks = {"evaluates": evaluate, "draws previews": preview}
        self._config, self._log, self._watch, self._preemption = config, log, watch, preemption

    def run(self, state: TrainState, frozen: Params, step: int, due: Due) -> tuple[float | None, bool]:
        """Runs the hooks that are due after a step; returns the score, and whether they were stopped."""
        if not due.hooks:
            return None, False
        try:
            with self._preemption.interrupting():
                return self._run(state, frozen, step, due.evaluate, due.preview), False
        except Interrupted:
            return None, True

    def run_owed(self, state: TrainState, frozen: Params, step: int, workdir: Path) -> None:
        """Runs the hooks that an earlier process owed; a score that it has logged is not computed again."""
        scored = any(row["step"] == step and self._config.best in row for row in read_metrics(workdir))
        due = self._config.due(step)
        self._run(state, frozen, step, due.evaluate and not scored, due.preview)

    def _run(self, state: TrainState, frozen: Params, step: int, *due: bool) -> float | None:
        """Runs the hooks, then logs what all of them returned; returns the score."""
        rows = []
        with self._log.paused():
            for (doing, hook), wanted in zip(self._hooks.items(), due, strict=True):
                if wanted and hook is not None:
                    self._watch.at(step, doing)
                    self._log.doing(doing)
                    rows.append(hook(state, frozen, step) or {})
        for row in rows:
            self._log.write(step, row)
        best = self._config.best
        return next((row[best] for row in rows if best in row), None)
