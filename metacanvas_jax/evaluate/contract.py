"""What an evaluator is: a function that draws or computes with a painter, in training as afterwards."""

import dataclasses
from pathlib import Path
from typing import Protocol

from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Asked:
    """How an evaluation is to be run. Each evaluator reads the fields that concern it.

    ``training`` asks for few prompts, as between two steps. ``guidance`` and ``seed`` None are those of the config;
    ``canvas`` False draws without the canvas. ``limit`` is the most prompts to draw (None: all). ``data`` is the file
    or folder that an evaluator reads, ``out`` the folder that it writes pictures to, both local or in a bucket.
    ``each`` results are drawn at once on a device (None: as the config says). ``step`` is that of the parameters;
    ``base`` says that they are those of the published backbone.
    """

    training: bool = False
    guidance: float | None = None
    canvas: bool = True
    seed: int | None = None
    limit: int | None = None
    data: str = ""
    out: Path | None = None
    each: int | None = None
    step: int = 0
    base: bool = False
    progress: bool = False


class Result(Protocol):
    """What an evaluator found."""

    def table(self) -> str:
        """The scores for reading."""
        ...

    def metrics(self) -> dict[str, float]:
        """The scores for the metrics of a training; "score", where there is one, is better the higher it is."""
        ...

    def save(self, path: Path) -> None:
        """The scores as JSON."""
        ...


class Evaluator(Protocol):
    """Evaluates parameters. All processes of a run call it together, and all get the same result.

    Raises UserError, before anything is drawn, when the run or what was asked does not suit the evaluator.
    """

    def __call__(self, painter: Painter, params: Params, asked: Asked) -> Result:
        """The result for these parameters."""
        ...
