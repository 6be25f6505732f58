"""``metacanvas evaluate``."""

import argparse
import math
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

EXAMPLE = "metacanvas evaluate --run runs/demo --guidance 1.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--evaluator", default="scenes", help="what scores it: scenes (default: scenes)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    options.add_verify(parser)
    parser.add_argument("--out", type=Path, help="JSON to write (RUN/scores.json)")


def run(arguments: argparse.Namespace) -> None:
    """Draws what an evaluator asks for, scores it and prints the scores."""
    from metacanvas_jax.evaluate.evaluators import EVALUATORS
    from metacanvas_jax.paint import runs

    if arguments.evaluator not in EVALUATORS:
        raise UserError(f"--evaluator is {arguments.evaluator!r}, expected one of {', '.join(EVALUATORS)}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance is {arguments.guidance}, expected a finite number")
    out = arguments.out or arguments.run / "scores.json"
    files.check_writable(out)
    trained = runs.load(arguments.run, verify=arguments.verify)
    scored = EVALUATORS[arguments.evaluator](
        trained.painter, trained.params, guidance=arguments.guidance, progress=True
    )
    scored.save(out)
    print(scored.table())
    print(out)
