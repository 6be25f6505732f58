"""``metacanvas plan --search``: meshes and rematerialisation for a slice, within a budget of compilations.

What cannot win without compiling is told by arithmetic: a batch that does not divide, heads that do not divide, a state
that alone is larger than a chip's memory. The rest is compiled, the most promising first, and every loser is told why.
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
    """A mesh, how the DiT is rematerialised, and the samples of a step."""

    mesh: MeshConfig
    remat: str
    batch: int

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={getattr(self.mesh, axis)}" for axis in ("data", "fsdp", "context", "tensor"))
        return f"{sizes} remat={self.remat} batch={self.batch}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A candidate, its report (None when it was not compiled) and why it is not the best (empty for the best)."""

    candidate: Candidate
    report: Report | None
    reason: str

    @property
    def per_sample(self) -> float:
        """Seconds per sample of the whole slice; infinite without a step that fits."""
        fits = self.report is not None and self.report.passed
        return self.report.seconds / self.report.samples if fits else float("inf")


def candidates(
    devices: int, batches: tuple[int, ...], width: int, remats: tuple[str, ...] = REMAT_CHOICES
) -> list[Candidate]:
    """Every mesh of powers of two, the plain ones (samples and parameters split, nothing else) first.

    Among those the ones whose gradients the compiler reduce-scatters instead of all-reducing: where the DiT's ``width``
    is cut into whole tiles, and not over all of 16 or more devices (seen with libtpu 0.0.42).
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
    """Outcomes, the best first; at most ``budget`` programs are compiled."""
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
    """The same, fastest per sample first, each loser with its reason."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.per_sample)
    best = outcomes[0].report if outcomes and outcomes[0].per_sample < float("inf") else None
    return [
        outcome if outcome.report is None else dataclasses.replace(outcome, reason=why_not(outcome.report, best))
        for outcome in outcomes
    ]


def why_not(report: Report, best: Report | None) -> str:
    """What costs a step more than the best one, per sample; empty for the best itself."""
    if not report.passed:
        return report.verdict.removeprefix("FAIL: ")
    if best is None or report is best:
        return ""
    columns = {
        "products": "products",
        "kernels": "attention kernels",
        "memory": "reading and writing HBM",
        "collectives": "collectives that nothing covers",
    }

    def of(x: Report, column: str) -> float:
        return sum(getattr(part, column) for part in x.parts) / x.samples

    more = {text: of(report, column) - of(best, column) for column, text in columns.items()}
    worst = max(more, key=lambda text: more[text])
    slower = report.seconds / report.samples / (best.seconds / best.samples) - 1
    return f"{slower:.0%} slower: {worst} cost {1e3 * more[worst]:.1f} ms per sample more"


def table(outcomes: list[Outcome]) -> str:
    """Outcomes as text."""
    lines = [f"{'ms/sample':>10}{'MFU':>7}{'peak GiB':>10}  candidate"]
    for outcome in outcomes:
        report = outcome.report
        figures = f"{'-':>10}{'-':>7}{'-':>10}"
        if report is not None:
            speed = f"{1e3 * outcome.per_sample:.1f}" if report.passed else "-"
            figures = f"{speed:>10}{report.mfu if report.passed else 0:>7.1%}{report.needed / GIB:>10.2f}"
        lines.append(f"{figures}  {outcome.candidate}  {outcome.reason or 'best'}")
    return "\n".join(lines) + "\n"


def _ready(experiment: Experiment, where: Slice, bucket: Bucket, candidate: Candidate) -> tuple[str, Program | None]:
    """(reason why not, None), or ("", the program) that is worth compiling."""
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
    if held > where.chip.hbm:
        return f"state and batch alone need {held / GIB:.1f} of {where.chip.hbm / GIB:.1f} GiB per device", None
    return "", program
