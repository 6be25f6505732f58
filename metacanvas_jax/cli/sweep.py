"""``metacanvas sweep``."""

import argparse
import shlex
from pathlib import Path

from metacanvas_jax.cli import options
from metacanvas_jax.config.load import ROOT, load_config
from metacanvas_jax.errors import UserError

EXAMPLE = """metacanvas sweep --config configs/connector_ablation.py:miniature --sweep configs/sweeps/connector.py
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --print
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --tpu
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --collect"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument("--sweep", type=Path, required=True, help="file with a function sweep(add): see configs/sweeps")
    parser.add_argument("--workdir", help="folder of all runs of the sweep, local or gs:// (runs/sweeps/NAME)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--print", action="store_true", help="print the command of every point and run nothing")
    how.add_argument("--tpu", action="store_true", help="print one job per point, made of tpu_scripts, run nothing")
    how.add_argument("--launch", action="store_true", help="start those jobs: a TPU slice for every point")
    parser.add_argument("--gke", action="store_true", help="with --tpu or --launch: JobSets on GKE, not TPU VMs")
    parser.add_argument("--dry-run", action="store_true", help="with --launch: print every command of the cloud")
    how.add_argument("--collect", action="store_true", help="write sweep.csv, sweep.md and sweep.html of what there is")


def run(arguments: argparse.Namespace) -> None:
    """Runs the points of a sweep one after another and gathers them, or does what an option says instead."""
    from metacanvas_jax import files
    from metacanvas_jax.launch import sweeps

    if arguments.gke and not (arguments.tpu or arguments.launch):
        raise UserError("--gke goes with --tpu or --launch")
    if arguments.dry_run and not arguments.launch:
        raise UserError("--dry-run goes with --launch; --print and --tpu run nothing anyway")
    points = sweeps.read(arguments.sweep, arguments.config)
    extra = arguments.overrides
    for point in points:  # every point is a config, before the first one is begun
        load_config(point.config, [*point.overrides, *extra])
    workdir = files.folder(arguments.workdir or Path("runs/sweeps") / arguments.sweep.stem)
    if arguments.print:
        for point in points:
            print(shlex.join(sweeps.train_command(point, workdir, extra)))
        return
    if arguments.tpu or arguments.launch:
        jobs = sweeps.tpu_jobs(points, str(arguments.sweep), extra, gke=arguments.gke)
        if arguments.launch:
            sweeps.launch(jobs, ROOT, dry_run=arguments.dry_run)
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
