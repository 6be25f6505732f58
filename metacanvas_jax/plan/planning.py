"""``metacanvas plan``: chooses the slice and the programs of a config, and prints and stores their reports."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config import read
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import make_mesh, parse_mesh
from metacanvas_jax.plan import page, programs, search
from metacanvas_jax.plan.advice import Step, advise
from metacanvas_jax.plan.report import Report, as_json, table
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice
from metacanvas_jax.tasks import TASKS, Bucket, any_length

FILE = "plan.json"  # the reports, for programs


def plan(
    name: str,
    config: ConfigDict,
    *,
    topology: str | None = None,
    mesh: str | None = None,
    bucket: str | None = None,
    sampling: bool = False,
    pixels: bool = False,
    budget: int = 0,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Report]:
    """Compiles the train step of a bucket (that with most pixels, a named one, or "all") and prints its report.

    A report of a training step says what would make it fit, or faster, and how long the training takes.

    By default the slice is the first of the config's ``hardware``, with the mesh given there. ``mesh``
    ("fsdp=32,tensor=4") replaces the config's mesh. The step reads stored latents. With ``pixels`` it encodes pixels,
    which takes many times as long to compile. With a ``budget``, this many candidates (mesh and rematerialisation) are
    compiled and compared instead. ``sampling`` also plans the drawing of a batch. ``plan.json`` and ``plan.html`` are
    written to the folder ``out``.

    Raises:
        UserError: an unknown slice, GPU or bucket, a mesh that does not fit it, a batch that does not divide, and,
            before anything is compiled, a folder ``out`` that cannot be written.
    """
    if out is not None:
        files.check_writable(out / FILE)
    experiment = read.experiment(config)
    experiment = experiment if pixels else programs.with_latents(experiment)
    asked = None if mesh is None else parse_mesh(mesh)  # else sampling chooses for itself
    if topology is None:
        if not experiment.hardware:
            raise UserError(f"{name} names no hardware: give a slice with --topology")
        topology, mesh = experiment.hardware[0].topology, mesh or experiment.hardware[0].mesh or None
    where = find_slice(topology)
    if budget:
        chosen = any_length(choose(experiment.shapes, bucket))[0]
        outcomes = search.search(name, experiment, where, chosen, budget=budget, say=say)
        print(search.table(outcomes), flush=True)
        steps = experiment.train.steps
        reports = [dataclasses.replace(one.report, steps=steps) for one in outcomes if one.report is not None]
        if reports:
            print(table(reports[0]), flush=True)
        if out is not None:
            write(out, reports)
        return reports[:1]
    shape = experiment.mesh if mesh is None else parse_mesh(mesh)
    devices = make_mesh(shape, where.devices)
    buckets = choose(experiment.shapes, bucket)
    steps = [Step(experiment, where, shape, chosen) for chosen in buckets]
    made = [programs.train_program(experiment, devices, chosen) for chosen in buckets]
    if sampling:
        made.append(programs.sample_program(experiment, where.devices, any_length(buckets)[0], asked))
    reports = []
    for program, step in zip(made, [*steps, None], strict=False):
        report = study(name, program, where, say)
        if step is not None:
            report = advised(report, step)
        reports.append(report)
        print(table(report), flush=True)
    if out is not None:
        write(out, reports)
    return reports


def advised(report: Report, step: Step) -> Report:
    """The report of a training step, with the length of the training and what would make the step fit, or faster."""
    return dataclasses.replace(report, steps=step.setup.train.steps, advice=advise(report, step))


def choose(buckets: tuple[Bucket, ...], task: str | None) -> list[Bucket]:
    """The buckets of a task; None is the one with most pixels, "all" is every bucket.

    Of equally many pixels it is the one with the longest prompts. Raises UserError for another task.
    """
    if task is None:
        return [max(buckets, key=lambda bucket: (size(bucket), bucket.length))]
    if task == "all":
        return list(buckets)
    found = [bucket for bucket in buckets if bucket.task == task]
    if not found:
        raise UserError(f"--bucket {task!r}: the config has {', '.join(b.task for b in buckets)}, or say 'all'")
    return found


def size(bucket: Bucket) -> int:
    """Pixels that a step of a bucket reads (target, source and references), as a measure of its cost."""
    frames = bucket.frames * (2 if TASKS[bucket.task].vae == "source" else 1) + bucket.references
    return (bucket.batch or 0) * frames * math.prod(bucket.size)


def write(folder: Path, reports: list[Report]) -> None:
    """Writes ``plan.json`` and ``plan.html`` into a folder, each atomically."""
    for name, text in ((FILE, as_json(reports)), ("plan.html", page.html(reports))):
        files.write(folder / name, text)
