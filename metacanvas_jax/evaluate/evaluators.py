"""The evaluators by name, and how several of them evaluate a run one after the other."""

from collections.abc import Callable, Mapping, Sequence

from metacanvas_jax.config.schema import EvaluatorName, Experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import flow_loss, held_out, prompts, scenes, tasks
from metacanvas_jax.evaluate.benchmarks import runner
from metacanvas_jax.evaluate.contract import Asked, Evaluator, Result
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.types import Params

EVALUATORS: dict[str, Evaluator] = {
    "scenes": scenes.evaluate,
    "tasks": tasks.evaluate,
    "flow_loss": flow_loss.evaluate,
    "prompts": prompts.evaluate,
    **{name: runner.evaluator(name) for name in runner.BENCHMARKS},
}
"""A new evaluator is a module here, a line in this table and in the next, and its name in ``config/schema.py``."""

CHECKS: dict[str, Callable[[Experiment], object]] = {
    "scenes": scenes.check,
    "tasks": tasks.check,
    "flow_loss": held_out.check,
}
"""What raises UserError for runs that an evaluator does not suit. Of a benchmark it is the reading of its prompts."""


def names_of(setup: Experiment) -> tuple[EvaluatorName, ...]:
    """The evaluators of a run: those of its config, else the judge of its world or, on other data, the loss."""
    return setup.eval.evaluators or (("flow_loss",) if setup.sources else ("scenes",))


def check(setup: Experiment, names: Sequence[str], asked: Asked) -> None:
    """Raises UserError, before a training begins, where an evaluator does not suit the run or misses its data."""
    for name in names:
        if name in runner.BENCHMARKS:
            runner.entries(name, setup, asked)
        elif name == "prompts":
            prompts.check(setup, asked)
        else:
            CHECKS[name](setup)


def run(painter: Painter, params: Params, names: Sequence[str], asked: Asked) -> dict[str, Result]:
    """The results of some evaluators by their names. Raises UserError for a name that is none."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"--evaluator is {name!r}, expected one of {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name](painter, params, asked) for name in names}


def metrics_of(results: Mapping[str, Result]) -> dict[str, float]:
    """The metrics of all results. The "score" of a training is that of the first; others have their name in front."""
    merged: dict[str, float] = {}
    for name, result in results.items():
        values = result.metrics()
        if "score" in merged and "score" in values:
            values = {key if key != "score" else f"{name}_score": value for key, value in values.items()}
        merged |= values
    return merged
