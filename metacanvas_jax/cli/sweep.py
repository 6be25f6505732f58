"""``metacanvas sweep``."""

import argparse
import shlex
from pathlib import Path

from metacanvas_jax.cli import options

EXAMPLE = """metacanvas sweep --config configs/connector_ablation.py:miniature --sweep configs/sweeps/connector.py
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --print
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --tpu
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --collect"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument("--sweep", type=Path, required=True, help="file with a function sweep(add): see configs/sweeps")
    parser.add_argument("--workdir", type=Path, help="folder of all runs of the sweep (runs/sweeps/NAME)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--print", action="store_true", help="print the command of every point and run nothing")
    how.add_argument("--tpu", action="store_true", help="print one job per point, made of tpu_scripts, run nothing")
    how.add_argument("--launch", action="store_true", help="start those jobs: a TPU slice for every point")
    how.add_argument("--collect", action="store_true", help="write sweep.csv, sweep.md and sweep.html of what there is")


def run(arguments: argparse.Namespace) -> None:
    """Runs the points of a sweep one after another and gathers them, or does what an option says instead."""
    from metacanvas_jax import sweeps

    points = sweeps.read(arguments.sweep, arguments.config)
    extra = arguments.overrides
    for point in points:  # every point is a config, before the first one is begun
        options.load_config(point.config, [*point.overrides, *extra])
    workdir = arguments.workdir or Path("runs/sweeps") / arguments.sweep.stem
    if arguments.print:
        for point in points:
            print(shlex.join(sweeps.train_command(point, workdir, extra)))
        return
    if arguments.tpu or arguments.launch:
        jobs = sweeps.tpu_jobs(points, str(arguments.sweep), extra)
        if arguments.launch:
            sweeps.launch(jobs, options.ROOT)
        else:
            print("\n".join(sweeps.shell(*job) for job in jobs))
        return
    try:
        if not arguments.collect:
            sweeps.run(points, workdir, extra)
    finally:
        if any(sweeps.history(workdir / point.name) for point in points) or arguments.collect:
            for path in sweeps.write(arguments.sweep.stem, points, workdir):
                print(path)
