"""The plan of a case of ``gpu_full.py``: its step compiled for a GPU that is not there."""

import sys
from pathlib import Path

from gpu_full_cases import Case, setup_of

from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.plan.programs import train_program, with_latents
from metacanvas_jax.plan.report import Report
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice


def planned(case: Case, topology: str, place: Path, small: bool) -> Report:
    """The report of the program that the stage ``step`` runs."""
    where, setup = find_slice(topology), with_latents(setup_of(case, place / "folders", small))
    program = train_program(setup, make_mesh(setup.mesh, where.devices), setup.shapes[0])
    return study(case.name, program, where, lambda line: print(line, file=sys.stderr, flush=True))
