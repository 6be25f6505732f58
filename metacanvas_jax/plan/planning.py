"""``metacanvas plan``: which programs of a config are looked at on which slice, and where the reports go."""

import math
import os
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from metacanvas_jax.config import read
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from metacanvas_jax.plan import page, programs, search
from metacanvas_jax.plan.report import Report, as_json, table
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice
from metacanvas_jax.tasks import TASKS, Bucket


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
    """Compiles the train step of a bucket (of most pixels, a named one, or "all") and prints its table.

    The slice ``topology`` is the first that the config names unless given, with the mesh that is for it.
    ``mesh`` ("fsdp=32,tensor=4") replaces the config's. The step reads stored latents, or with ``pixels`` encodes
    what it reads, which takes the compiler many times as long. With a ``budget`` so many meshes and ways to
    rematerialise are compiled and compared instead. With ``sampling`` the drawing of a batch is planned as well.
    ``out`` gets ``plan.json`` and ``plan.html``.

    Raises:
        UserError: an unknown slice or bucket, a mesh that does not fit it, a batch that does not divide.
    """
    experiment = read.experiment(config)
    experiment = experiment if pixels else programs.with_latents(experiment)
    if topology is None:
        if not experiment.hardware:
            raise UserError(f"{name} names no hardware: give a slice with --topology")
        topology, mesh = experiment.hardware[0].topology, mesh or experiment.hardware[0].mesh or None
    where = find_slice(topology)
    if budget:
        chosen = choose(experiment.shapes, bucket)[0]
        outcomes = search.search(name, experiment, where, chosen, budget=budget, say=say)
        print(search.table(outcomes), flush=True)
        reports = [outcome.report for outcome in outcomes if outcome.report is not None]
        if reports:
            print(table(reports[0]), flush=True)
        if out is not None:
            write(out, reports)
        return reports[:1]
    devices = make_mesh(experiment.mesh if mesh is None else parse_mesh(mesh), where.devices)
    buckets = choose(experiment.shapes, bucket)
    made = [programs.train_program(experiment, devices, chosen) for chosen in buckets]
    if sampling:
        made.append(programs.sample_program(experiment, devices, buckets[0]))
    reports = []
    for program in made:
        reports.append(study(name, program, where, say))
        print(table(reports[-1]), flush=True)
    if out is not None:
        write(out, reports)
    return reports


def choose(buckets: tuple[Bucket, ...], task: str | None) -> list[Bucket]:
    """The buckets asked for; None is the one with most pixels, given ones too. Raises UserError for another name."""
    if task is None:
        return [max(buckets, key=size)]
    if task == "all":
        return list(buckets)
    found = [bucket for bucket in buckets if bucket.task == task]
    if not found:
        raise UserError(f"--bucket {task!r}: the config has {', '.join(b.task for b in buckets)}, or say 'all'")
    return found


def size(bucket: Bucket) -> int:
    """Pixels that a step of a bucket reads: what its work grows with."""
    frames = bucket.frames * (2 if TASKS[bucket.task].vae == "source" else 1) + bucket.references
    return (bucket.batch or 0) * frames * math.prod(bucket.size)


def parse_mesh(text: str) -> MeshConfig:
    """``data=1,fsdp=32,tensor=4`` to a mesh; axes that are not named are 1. Raises UserError for anything else."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in AXES or not size.strip().removeprefix("-").isdigit():
            raise UserError(f"--mesh {text!r}: expected AXIS=N,... with axes {', '.join(AXES)}, found {part!r}")
        sizes[axis.strip()] = int(size)
    return MeshConfig(**sizes)


def write(folder: Path, reports: list[Report]) -> None:
    """``plan.json`` and ``plan.html``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("plan.json", as_json(reports)), ("plan.html", page.html(reports))):
        draft = folder / f".{name}.tmp"
        draft.write_text(text)
        os.replace(draft, folder / name)
