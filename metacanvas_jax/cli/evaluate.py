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
    parser.add_argument("--evaluator", help="what scores it: scenes or flow_loss (default: those of the config)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    options.add_verify(parser)
    options.add_mesh(parser)
    parser.add_argument("--out", type=Path, help="JSON to write (RUN/scores.json)")


def run(arguments: argparse.Namespace) -> None:
    """Draws what an evaluator asks for, scores it and prints the scores."""
    from metacanvas_jax.evaluate import evaluators
    from metacanvas_jax.evaluate.contract import Asked
    from metacanvas_jax.paint import placing, runs
    from metacanvas_jax.paint.painter import Painter

    if arguments.evaluator is not None and arguments.evaluator not in evaluators.EVALUATORS:
        known = ", ".join(evaluators.EVALUATORS)
        raise UserError(f"--evaluator is {arguments.evaluator!r}, expected one of {known}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance is {arguments.guidance}, expected a finite number")
    out = arguments.out or arguments.run / "scores.json"
    files.check_writable(out)
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(runs.setup_of(arguments.run))
        held = painter.held()
        mesh = placing.mesh_for(painter.setup, held, chosen=options.mesh(arguments.mesh))
        trained = runs.load(arguments.run, verify=arguments.verify, mesh=mesh, needs=held, painter=painter)
        names = (arguments.evaluator,) if arguments.evaluator else evaluators.names_of(painter.setup)[:1]
        asked = Asked(guidance=arguments.guidance, progress=writes)
        for result in evaluators.run(trained.painter, trained.params, names, asked).values():
            if writes:
                result.save(out)
                print(result.table())
    print(out)
