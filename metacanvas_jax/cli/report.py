"""``metacanvas report``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

EXAMPLE = "metacanvas report --run runs/demo --draw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", required=True, help="folder of a run, finished or not")
    parser.add_argument("--draw", action="store_true", help="load the run and draw with canvas maps and without canvas")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that --draw begins with (0)")
    options.add_checkpoint(parser)
    parser.add_argument("--out", help="HTML file to write (RUN/report.html)")


def run(arguments: argparse.Namespace) -> None:
    """Writes one HTML file that opens offline."""
    from metacanvas_jax.launch import run_report
    from metacanvas_jax.paint import runs

    folder = files.folder(arguments.run)
    out = files.folder(arguments.out or folder / "report.html")
    files.check_writable(out)
    options.check_seed(arguments.seed)
    if arguments.checkpoint is not None and not arguments.draw:
        raise UserError("--checkpoint goes with --draw")
    trained = runs.load(folder, step=arguments.checkpoint) if arguments.draw else None
    print(run_report.write(folder, trained, out, seed=arguments.seed))
