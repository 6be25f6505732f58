"""The evaluators by name. An evaluator draws what it scores with a painter, in training as afterwards."""

from pathlib import Path
from typing import Protocol

from metacanvas_jax.evaluate import scenes
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.types import Params


class Result(Protocol):
    """What an evaluator found."""

    def table(self) -> str:
        """The scores for reading."""
        ...

    def metrics(self) -> dict[str, float]:
        """The scores for the metrics of a training; "score" is the one that decides which checkpoint is best."""
        ...

    def save(self, path: Path) -> None:
        """The scores as JSON."""
        ...


class Evaluator(Protocol):
    """A function that draws and scores."""

    def __call__(
        self,
        painter: Painter,
        params: Params,
        *,
        training: bool = False,
        guidance: float | None = None,
        progress: bool = False,
    ) -> Result:
        """The scores of these parameters: during ``training`` on few prompts; ``guidance`` None is the config's."""
        ...


EVALUATORS: dict[str, Evaluator] = {"scenes": scenes.evaluate}
