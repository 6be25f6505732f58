"""``metacanvas sweep``."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.files import ROOT

EXAMPLE = """metacanvas sweep --config configs/connector_ablation.py:miniature --sweep configs/sweeps/connector.py
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --print
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --launch
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --status
         metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py --collect"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument("--sweep", type=Path, required=True, help="file with a function sweep(add): see configs/sweeps")
    parser.add_argument(
        "--data", metavar="FOLDER", help="your own samples for every point, as in metacanvas train; not with TPU slices"
    )
    parser.add_argument(
        "--workdir", help="folder of all runs of the sweep, local or gs:// (runs/sweeps/NAME; on TPUs RUNS/NAME)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--print", action="store_true", help="print the command of every point and run nothing")
    how.add_argument("--tpu", action="store_true", help="print one job per point, made of tpu_scripts, run nothing")
    how.add_argument("--launch", action="store_true", help="start those jobs: a TPU slice for every point")
    how.add_argument("--status", action="store_true", help="say of every launched point what it does and how far it is")
    how.add_argument("--teardown", action="store_true", help="give back the slices of the points that are done")
    how.add_argument("--collect", action="store_true", help="write sweep.csv, sweep.md and sweep.html of what there is")
    parser.add_argument("--gke", action="store_true", help="with --tpu or --launch: JobSets on GKE, not TPU VMs")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --launch or --teardown: print every command of the cloud"
    )
    parser.add_argument("--yes", action="store_true", help="with --launch or --teardown: do not ask")


def run(arguments: argparse.Namespace) -> None:
    """Runs the points of a sweep one after another and gathers them, or does what an option says instead."""
    from metacanvas_jax.config import paths
    from metacanvas_jax.launch import sweeps

    if arguments.gke and not (arguments.tpu or arguments.launch):
        raise UserError("--gke goes with --tpu or --launch")
    for name in ("dry_run", "yes"):
        if getattr(arguments, name) and not (arguments.launch or arguments.teardown):
            raise UserError(f"--{name.replace('_', '-')} goes with --launch or --teardown")
    slices = arguments.tpu or arguments.launch or arguments.status or arguments.teardown
    if arguments.data is not None and slices:
        raise UserError("--data goes with runs on this machine; for slices set --config.sources[0].path and .kind")
    points = sweeps.read(arguments.sweep, arguments.config)
    # Every point is a config, before the first one is begun.
    configs = [load_config(point.config, [*point.overrides, *arguments.overrides]) for point in points]
    if slices:
        _on_slices(arguments, points, configs)
        return
    extra = [*arguments.overrides, *([] if arguments.data is None else ["--data", arguments.data])]
    workdir = paths.workdir(configs[0], arguments.workdir, f"sweeps/{arguments.sweep.stem}")
    if arguments.print:
        for point in points:
            print(shlex.join(sweeps.train_command(point, workdir, extra)))
        return
    try:
        if not arguments.collect:
            sweeps.run(points, workdir, extra)
    finally:
        if any(sweeps.history(workdir / point.name) for point in points) or arguments.collect:
            for path in sweeps.write(arguments.sweep.stem, points, workdir):
                print(path)


def _on_slices(arguments: argparse.Namespace, points: Any, configs: Any) -> None:
    from metacanvas_jax.launch import cloud, jobs

    name = arguments.sweep.stem
    environment = jobs.defaults(ROOT)
    workdir = (arguments.workdir or f"{environment['RUNS']}/{name}").rstrip("/")
    found = cloud.make_jobs(points, configs, name, workdir, environment, arguments.overrides)
    scripts = cloud.GKE_SCRIPTS if arguments.gke else cloud.TPU_SCRIPTS
    if arguments.tpu:
        print("\n".join(cloud.shell(job, scripts) for job in found))
        return
    if arguments.status:
        cloud.status(found, ROOT)
        return
    options_of_scripts = ["--dry-run"] if arguments.dry_run else ["--yes"]
    if arguments.teardown:
        done = [job for job in found if cloud.finished(job)]
        for job in found:
            print(f"{job.point.name}: {'done' if job in done else 'not done, its slice stays'}")
        if not done:
            return
        found, scripts, what = done, ("teardown.sh",), "end"
    else:
        what = "start"
    if not (arguments.yes or arguments.dry_run):
        options.agreed(f"{'delete' if arguments.teardown else 'create'} {cloud.machines(found, environment)}")
    cloud.run_scripts(found, ROOT, scripts, options_of_scripts, what)
