"""The full-size configs on their recommended slices: the jobs that ``make plan-all`` and the slow tests compile."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.schema import Experiment, Hardware
from metacanvas_jax.hardware import slice_name
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.advice import Step
from metacanvas_jax.plan.planning import advised, choose, parse_mesh
from metacanvas_jax.plan.report import Report
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice


@dataclasses.dataclass(frozen=True)
class Job:
    """A config file, with its variant if it is not the first, on one of the slices that it was planned for."""

    config: str
    on: Hardware

    @property
    def title(self) -> str:
        """The config file and its overrides."""
        return " ".join((self.config, *self.on.overrides, *(("from pixels",) if self.on.pixels else ())))

    @property
    def name(self) -> str:
        """The config file without its folder and ending, and the variant, as a part of a file name."""
        file, _, variant = self.config.partition(":")
        return Path(file).stem + (f"-{variant}" if variant else "")

    def experiment(self) -> Experiment:
        """The experiment. Its data are not read."""
        setup = read.experiment(load_config(self.config, list(self.on.overrides)))
        return setup if self.on.pixels else programs.with_latents(setup)


@functools.cache
def jobs() -> tuple[Job, ...]:
    """Every config of ``configs/planned.json`` on each of its recommended slices whose report is kept."""
    names = [f"configs/{name}" for name in files.read_json(files.ROOT / "configs" / "planned.json", list)]
    rows = {name: read.experiment(load_config(name, [])).hardware for name in names}
    return tuple(Job(name, row) for name in names for row in rows[name] if row.kept)


def recommended(experiment: Experiment) -> str:
    """The recommended hardware of an experiment in words, as the head of its config file states it."""
    where = slice_name(experiment.hardware[0].topology)
    shares = {}
    for bucket in experiment.shapes:
        medium = "image" if bucket.frames == 1 else "video"
        shares.setdefault(medium, bucket.batch // where.chips)
    parts = [f"{count} {medium}{'s' * (count > 1)}" for medium, count in shares.items()]
    return f"{where}, {' or '.join(parts)} per chip"


def run_job(job: Job, say: Callable[[str], None] = lambda line: None, *, sampling: bool = False) -> Iterator[Report]:
    """Yields the report of the training step on the most expensive bucket, then, if asked for, that of sampling."""
    experiment = job.experiment()
    where = find_slice(job.on.topology)
    shape = parse_mesh(job.on.mesh) if job.on.mesh else experiment.mesh
    mesh = make_mesh(shape, where.devices)
    buckets = choose(experiment.shapes, None)
    for bucket in buckets:
        report = study(job.title, programs.train_program(experiment, mesh, bucket), where, say)
        yield advised(report, Step(experiment, where, shape, bucket))
    if sampling:
        yield study(job.title, programs.sample_program(experiment, where.devices, buckets[0]), where, say)
