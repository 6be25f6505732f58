"""How parameters of shipped configs lie on their meshes, as text. ``python tests/sharding_golden.py`` writes it anew.

``tests/golden/sharding`` holds one file per config and mesh, with a line per parameter. ``-`` is an axis that every
device has whole.
"""

import functools
import sys
from pathlib import Path

from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from metacanvas_jax.hardware import slice_name
from metacanvas_jax.parallel.mesh import AXES, mesh_sizes
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.planning import parse_mesh
from metacanvas_jax.plan.shipped import Job, jobs
from metacanvas_jax.trees import flat

FOLDER = Path(__file__).parent / "golden" / "sharding"
experiment = functools.cache(Job.experiment)  # whose shapes are made once


def mesh_of(job: Job) -> AbstractMesh:
    """The mesh of a job, without its devices."""
    devices = slice_name(job.on.topology).devices
    config = parse_mesh(job.on.mesh) if job.on.mesh else experiment(job).mesh
    return AbstractMesh(mesh_sizes(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def name_of(job: Job) -> str:
    """The same for jobs whose shardings are."""
    sizes = "_".join(f"{axis}{size}" for axis, size in mesh_of(job).shape.items() if size > 1)
    whole = experiment(job).mesh.whole
    return f"{job.name}.{sizes}{'.whole_' * bool(whole)}{'_'.join(whole)}"


CASES = {name_of(job): job for job in jobs() if not job.on.pixels}


def written(spec: PartitionSpec, rank: int) -> str:
    """``fsdp, -, tensor+context``."""
    entries = tuple(spec) + (None,) * (rank - len(spec))
    return ", ".join("-" if x is None else x if isinstance(x, str) else "+".join(x) for x in entries) or "-"


def parameters(job: Job) -> list[str]:
    """``trained dit/blocks/up/kernel float32[30,3072,14336]: -, fsdp, -``, sorted by path."""
    lines = []
    for kind, tree in zip(("trained", "frozen"), programs.abstract_params(experiment(job), mesh_of(job)), strict=True):
        for path, leaf in flat(tree).items():
            shape = ",".join(map(str, leaf.shape))
            lines.append((path, f"{kind} {path} {leaf.dtype}[{shape}]: {written(leaf.sharding.spec, len(leaf.shape))}"))
    return [line for _, line in sorted(lines)]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for stale in FOLDER.glob("*.txt"):
        stale.unlink()
    for case, job in CASES.items():
        (FOLDER / f"{case}.txt").write_text("\n".join(parameters(job)) + "\n")
        print(case, file=sys.stderr)
