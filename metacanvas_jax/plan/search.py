"""``metacanvas plan --search``: searches the mesh and the rematerialisation for a slice, with a budget of compilations.

Some candidates are refused without compiling: a batch or heads that do not divide among the devices, or a train state
larger than a chip's memory. The others are compiled, the most promising first. Every candidate but the best gets a
reason.
"""

import dataclasses
import itertools
from collections.abc import Callable

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import GIB
from metacanvas_jax.nn.stack import REMAT_CHOICES
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.report import Report
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import Slice
from metacanvas_jax.tasks import Bucket

WIDEST = 16  # of the context and tensor axes
TILE = 16  # rows of bfloat16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the ``remat`` of the DiT, and the samples of a step."""

    mesh: MeshConfig
    remat: str
    batch: int

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={getattr(self.mesh, axis)}" for axis in ("data", "fsdp", "context", "tensor"))
        return f"{sizes} remat={self.remat} batch={self.batch}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A candidate, its report (None if it was not compiled), and the reason why it is not the best (empty if it is)."""

    candidate: Candidate
    report: Report | None
    reason: str

    @property
    def per_sample(self) -> float:
        """Expected seconds per sample on the whole slice; infinite if the step does not fit."""
        fits = self.report is not None and self.report.passed
        return self.report.expected / self.report.samples if fits else float("inf")


def candidates(
    devices: int, batches: tuple[int, ...], width: int, remats: tuple[str, ...] = REMAT_CHOICES
) -> list[Candidate]:
    """All meshes of powers of two; those that split only samples and parameters come first.

    Among these, meshes for which the compiler reduce-scatters gradients come before those with an all-reduce. With
    libtpu 0.0.42 it reduce-scatters if the DiT's ``width`` is cut into whole tiles, and not over all of 16 or more
    devices.
    """
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    found = []
    for data, context, tensor in itertools.product(powers, powers, powers):
        if devices % (data * context * tensor) or max(context, tensor) > WIDEST:
            continue
        mesh = MeshConfig(data=data, fsdp=devices // (data * context * tensor), context=context, tensor=tensor)
        found += [Candidate(mesh, remat, batch) for remat in remats for batch in batches]
    lightest = list(remats)

    def order(candidate: Candidate) -> tuple[int, ...]:
        mesh = candidate.mesh
        cuts = mesh.fsdp * mesh.context
        all_reduced = width % (TILE * cuts) != 0 or cuts == devices >= 16
        return mesh.context * mesh.tensor, all_reduced, mesh.data, mesh.tensor, -lightest.index(candidate.remat)

    return sorted(found, key=order)


def search(
    name: str,
    experiment: Experiment,
    where: Slice,
    bucket: Bucket,
    *,
    budget: int = 8,
    batches: tuple[int, ...] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """The outcomes of all candidates, the best first. At most ``budget`` programs are compiled."""
    outcomes: list[Outcome] = []
    compiled = 0
    for candidate in candidates(where.size, batches or (bucket.batch,), experiment.dit.width):
        if candidate.mesh.data % where.slices:
            continue
        reason, program = _ready(experiment, where, bucket, candidate)
        if program is None:
            outcomes.append(Outcome(candidate, None, reason))
        elif compiled < budget:
            compiled += 1
            outcomes.append(Outcome(candidate, study(f"{name} {candidate}", program, where, say), ""))
        else:
            outcomes.append(Outcome(candidate, None, f"not compiled: the {budget} compilations went to simpler meshes"))
    return ranked(outcomes)


def ranked(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes sorted by expected seconds per sample, each with the reason why it is not the best."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.per_sample)
    best = outcomes[0].report if outcomes and outcomes[0].per_sample < float("inf") else None
    return [
        outcome if outcome.report is None else dataclasses.replace(outcome, reason=why_not(outcome.report, best))
        for outcome in outcomes
    ]


def why_not(report: Report, best: Report | None) -> str:
    """The cost that exceeds that of the best step most, per sample; empty for the best."""
    if not report.passed:
        return report.verdict.removeprefix("FAIL: ")
    if best is None or report is best:
        return ""
    names = {
        "products": "products",
        "attention forward": "attention kernels",
        "attention backward": "attention kernels of the backward pass",
        "memory": "reading and writing HBM",
        "collectives": "exposed collectives",
        "host": "copies to and from the host",
    }
    ours, others = report.expected_by_kind, best.expected_by_kind
    more = {text: ours[kind] / report.samples - others[kind] / best.samples for kind, text in names.items()}
    worst = max(more, key=lambda text: more[text])
    slower = report.expected / report.samples / (best.expected / best.samples) - 1
    return f"{slower:.0%} slower: {worst} cost {1e3 * more[worst]:.1f} ms per sample more"


def table(outcomes: list[Outcome]) -> str:
    """Outcomes as text."""
    lines = [f"{'ms/sample':>10}{'MFU':>7}{'peak GiB':>10}  candidate"]
    for outcome in outcomes:
        report = outcome.report
        figures = f"{'-':>10}{'-':>7}{'-':>10}"
        if report is not None:
            speed = f"{1e3 * outcome.per_sample:.1f}" if report.passed else "-"
            figures = f"{speed:>10}{report.expected_mfu if report.passed else 0:>7.1%}{report.needed / GIB:>10.2f}"
        lines.append(f"{figures}  {outcome.candidate}  {outcome.reason or 'best'}")
    return "\n".join(lines) + "\n"


def _ready(experiment: Experiment, where: Slice, bucket: Bucket, candidate: Candidate) -> tuple[str, Program | None]:
    """(the reason of a refusal, None), or ("", the program to compile)."""
    changed = dataclasses.replace(experiment, dit=dataclasses.replace(experiment.dit, remat=candidate.remat))
    heads = experiment.dit.heads
    if heads % candidate.mesh.tensor:
        return f"{heads} heads do not divide among tensor {candidate.mesh.tensor}", None
    try:
        mesh = make_mesh(candidate.mesh, where.devices)
        program = programs.train_program(changed, mesh, dataclasses.replace(bucket, batch=candidate.batch))
    except UserError as error:
        return str(error), None
    held = sum(program.held.values())
    if held > where.limit:
        return f"state and batch alone need {held / GIB:.1f} of {where.limit / GIB:.1f} GiB per device", None
    return "", program
