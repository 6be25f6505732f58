"""The report of ``metacanvas plan`` on one program and one slice, as a table or as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from metacanvas_jax.hardware import CHIPS, GIB, GPUS
from metacanvas_jax.plan import calibration, gpu_cost, parts, units
from metacanvas_jax.plan.calibration import Factors
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.topology import Slice

ASSUMPTIONS = (
    "Best times are a bound by the compiled program, not measurements: products by the compiler's cycles, other "
    "operations by HBM bytes at 85 % of the bandwidth, kernels by their static schedule, collectives by bytes over all "
    "links of the torus. Expected times take collectives over two links (`exposed` is what nothing hides of them) and "
    "multiply all with factors that were fitted on jobs which others measured; their range is the largest error over "
    "jobs that were not fitted (docs/planning.md)",
    "MFU = model FLOPs / (devices x peak FLOP/s x step seconds). Model FLOPs are those of the forward pass and of the "
    "backward passes that training needs (frozen networks once, attention three times its forward). Recomputation does "
    "not count",
    "Training reads stored latents and media for the MLLM (`metacanvas prepare --latents`), or encodes pixels in the "
    'step where the name says "from pixels". "Without VAE" leaves out the FLOPs and seconds of the autoencoder',
    "Activations are the peak minus parameters, optimizer and batch. Gaps between buffers add up to a tenth. A program "
    "that compiles fits",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a step: FLOPs over all devices, seconds on one device.

    ``flops`` are those of the compiled program, ``traced_flops`` those of the program as written. ``model_flops`` are
    those that the model needs, without recomputation.
    """

    name: str
    flops: float
    traced_flops: float
    model_flops: float
    products: float
    kernels: float
    memory: float
    collectives: float  # only the time that is not hidden behind other operations
    host: float = 0.0  # of the memory's seconds, copies to and from the host that nothing hides
    starts: int = 0  # products, each run counted

    @property
    def seconds(self) -> float:
        """The sum over products, kernels, memory and collectives over two links."""
        return self.products + self.kernels + self.memory + self.collectives


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All calls of one Pallas kernel in one part of a step: FLOPs and seconds on one device."""

    name: str
    part: str
    count: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, group size and overlap: GB on the wire of one device, and seconds."""

    kind: str
    group: int
    overlap: str
    count: int
    bytes: float
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of one program. ``memory`` is in bytes per device by category; ``seconds`` are those of one step.

    ``recomputed`` are the seconds of a step that repeat its forward pass, ``steps`` those of the whole training (0:
    none), ``advice`` what would make it fit or faster (`plan/advice.py`). ``note`` is what else a reader must know.
    """

    config: str
    program: str
    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    samples: int
    passed: bool
    verdict: str
    memory: dict[str, float]
    needed: float
    limit: float
    parts: tuple[Part, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    collectives: tuple[Collective, ...] = ()
    worst: tuple[str, ...] = ()
    peak_flops: float = 0.0
    host_bytes: float = 0.0
    compile_seconds: float = 0.0
    recomputed: float = 0.0
    steps: int = 0
    advice: tuple[str, ...] = ()
    note: str = ""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on."""
        return (*gpu_cost.ASSUMPTIONS, *ASSUMPTIONS[1:3]) if self.chip in GPUS else ASSUMPTIONS

    @property
    def factors(self) -> Factors:
        """What makes expected seconds of best ones."""
        return calibration.factors_of(self.chip)

    @property
    def reach(self) -> float:
        """Of the seconds of collectives, the share that is left if they use all links of the torus."""
        exposed = sum(row.exposed for row in self.collectives)
        if self.chip in GPUS or "*" in self.topology or not exposed:
            return 1.0
        rows = ((row.seconds, row.exposed, row.group) for row in self.collectives)
        return calibration.least_collectives(rows, CHIPS[self.chip].torus) / exposed

    def times_of(self, part: Part) -> tuple[float, ...]:
        """Seconds of a part: products, kernels, memory, collectives over two links; the best, and the expected ones."""
        best = part.products + part.kernels + part.memory + part.collectives * self.reach
        return part.products, part.kernels, part.memory, part.collectives, best, self.expected_of(part)

    def basis_of(self, part: Part) -> dict[str, float]:
        """What the factors multiply: seconds of a part by kind."""
        attention = [(row.name, row.seconds) for row in self.kernels if row.part == part.name]
        return calibration.basis(part.products, part.kernels, part.memory, part.collectives, part.host, attention)

    def expected_of(self, part: Part) -> float:
        """The expected seconds of a part."""
        return sum(self.factors.expected(self.basis_of(part), part.starts).values())

    @property
    def expected(self) -> float:
        """The expected seconds of a step, by factors fitted on measured jobs."""
        return sum(self.expected_of(part) for part in self.parts)

    @property
    def best_by_kind(self) -> dict[str, float]:
        """The best seconds of a step by kind."""
        basis = calibration.sums(self.basis_of(part) for part in self.parts)
        return basis | {"collectives": basis["collectives"] * self.reach}

    @property
    def expected_by_kind(self) -> dict[str, float]:
        """The expected seconds of a step by kind."""
        basis = calibration.sums(self.basis_of(part) for part in self.parts)
        return self.factors.expected(basis, sum(part.starts for part in self.parts))

    @property
    def carried(self) -> list[str]:
        """Which factors make the difference between best and expected seconds."""
        return calibration.carried(self.best_by_kind, self.expected_by_kind, self.factors)

    @property
    def days(self) -> float:
        """The expected time of a training whose steps are all such."""
        return self.steps * self.expected / 86400

    @property
    def chip_hours(self) -> float:
        """That time on every chip."""
        return 24 * self.days * self.devices

    @property
    def seconds(self) -> float:
        """The best time of one step by the compiled program: a lower bound."""
        return sum(self.times_of(part)[4] for part in self.parts)

    @property
    def flops(self) -> float:
        """FLOPs of one step on all devices, with recomputation."""
        return sum(part.flops for part in self.parts)

    @property
    def model_flops(self) -> float:
        """FLOPs of one step, without recomputation."""
        return sum(part.model_flops for part in self.parts)

    @property
    def mfu(self) -> float:
        """The best model FLOPs utilisation, the share of the slice's peak FLOP/s: an upper bound."""
        return self._utilisation(self.seconds)

    @property
    def expected_mfu(self) -> float:
        """The expected model FLOPs utilisation."""
        return self._utilisation(self.expected)

    def _utilisation(self, seconds: float) -> float:
        return self.model_flops / (self.devices * self.peak_flops * seconds) if seconds else 0.0

    def without(self, *names: str) -> "Report":
        """The same step without some parts, as if their results had been computed ahead of training."""
        return dataclasses.replace(self, parts=tuple(part for part in self.parts if part.name not in names))

    @property
    def runs_vae(self) -> bool:
        """Whether the autoencoder is part of the program."""
        return any(part.name == parts.VAE for part in self.parts)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the compiled products and kernels over those of the program as written."""
        traced = sum(part.traced_flops for part in self.parts)
        return sum(part.flops for part in self.parts) / traced if traced else 0.0

    def canvas_share(self, what: str = "expected") -> float:
        """The cost of the canvas relative to the step without it, in "expected" seconds or "flops"."""
        value = self.expected_of if what == "expected" else lambda part: getattr(part, what)
        of_canvas = sum(value(part) for part in self.parts if part.name in parts.CANVAS_PARTS)
        rest = sum(value(part) for part in self.parts) - of_canvas
        return of_canvas / rest if rest else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        derived = {
            "seconds": self.seconds,
            "expected_seconds": self.expected,
            "expected_range": self.factors.interval(self.expected),
            "model_flops": self.model_flops,
            "mfu": self.mfu,
            "expected_mfu": self.expected_mfu,
            "mfu_without_vae": self.without(parts.VAE).mfu,
            "expected_mfu_without_vae": self.without(parts.VAE).expected_mfu,
            "factors": self.factors.values,
            "factors_note": self.factors.note,
            "factors_carried": self.carried,
            "flops_ratio": self.flops_ratio,
            "canvas_seconds_share": self.canvas_share(),
            "canvas_flops_share": self.canvas_share("flops"),
            "days": self.days,
            "chip_hours": self.chip_hours,
            "assumptions": self.assumptions,
        }
        return dataclasses.asdict(self) | derived

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Report":
        """The inverse of ``to_dict``; fields that an older report does not have stay empty."""
        fields = {field.name: tree[field.name] for field in dataclasses.fields(cls) if field.name in tree}
        fields["parts"] = tuple(Part(**part) for part in fields["parts"])
        fields["kernels"] = tuple(Kernel(**row) for row in fields.get("kernels", ()))
        fields["collectives"] = tuple(Collective(**row) for row in fields["collectives"])
        return cls(**fields | {"worst": tuple(fields["worst"]), "advice": tuple(fields.get("advice", ()))})


def about(config: str, program: Program, where: Slice) -> dict[str, Any]:
    """What a report says of its program and slice, whether it fits or not."""
    return {
        "config": config,
        "program": program.name,
        "topology": where.name,
        "chip": where.chip.name,
        "devices": where.size,
        "mesh": dict(program.mesh.shape),
        "samples": program.samples,
    }


def failed_report(config: str, program: Program, where: Slice, message: str, needed: float) -> Report:
    """The report of a program that does not fit."""
    return Report(
        **about(config, program, where),
        passed=False,
        verdict=f"FAIL: {message}",
        memory=dict(program.held) | {"activations": max(needed - sum(program.held.values()), 0.0)},
        needed=needed,
        limit=where.limit,
        peak_flops=where.chip.flops,
    )


def table(report: Report) -> str:
    """The report as text for a terminal."""
    unit, byte = units.memory_unit(report.needed)
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    lines = [
        f"{report.config}: {report.program}, {report.samples} samples, on {report.topology} "
        f"({report.devices} devices, {mesh})",
        report.verdict,
        "",
        f"{'memory of a GPU' if report.chip in GPUS else 'HBM per device'}, {unit}",
    ]
    lines += [f"  {name:<22}{size / byte:10.2f}" for name, size in report.memory.items()]
    share = report.needed / report.limit
    lines.append(f"  {'peak':<22}{report.needed / byte:10.2f}  of {report.limit / byte:.2f} ({share:.0%})")
    if report.host_bytes:
        lines.append(f"  {'offloaded to the host':<22}{report.host_bytes / GIB:10.2f}")
    if not report.parts:
        return "\n".join(lines + advice(report)) + "\n"
    (time, second), (work, flop) = units.time_unit(report.seconds), units.flop_unit(report.flops)
    first, time = ("part", "seconds") if second == 1 else (f"part, times in {time}", time)
    lines += [
        "",
        f"{first:<20}{work:>10}{'/ written':>10}{'products':>10}{'kernels':>10}{'memory':>10}{'exposed':>10}"
        f"{'best':>10}{'expected':>10}{'share':>8}",
    ]
    for part in report.parts:
        ratio = f"{part.flops / part.traced_flops:.3f}" if part.traced_flops else "-"
        lines.append(
            f"{part.name:<20}{part.flops / flop:>10.3f}{ratio:>10}"
            + "".join(f"{value / second:>10.4f}" for value in report.times_of(part))
            + f"{report.expected_of(part) / report.expected:>8.1%}"
        )
    totals = (sum(values) for values in zip(*(report.times_of(part) for part in report.parts), strict=True))
    lines.append(
        f"{'step':<20}{report.flops / flop:>10.3f}{report.flops_ratio:>10.3f}"
        + "".join(f"{value / second:>10.4f}" for value in totals)
        + f"{1:>8.0%}"
    )
    if report.kernels:
        lines += ["", f"{'kernel':<30}{'part':<20}{'count':>8}{'TFLOP':>10}{time:>10}"]
        lines += [
            f"{row.name:<30}{row.part:<20}{row.count:>8}{row.flops / 1e12:>10.3f}{row.seconds / second:>10.4f}"
            for row in report.kernels
        ]
    lines += ["", f"{'collective':<20}{'devices':>8}{'overlap':>9}{'count':>8}{'GB':>10}{time:>10}{'exposed':>10}"]
    lines += [
        f"{row.kind:<20}{row.group:>8}{row.overlap:>9}{row.count:>8}{row.bytes / 1e9:>10.3f}"
        f"{row.seconds / second:>10.4f}{row.exposed / second:>10.4f}"
        for row in report.collectives
    ]
    lines += ["", *outlook(report)]
    if report.steps:
        lines.append(lasts(report))
    if report.runs_vae:
        rest = report.without(parts.VAE)
        lines.append(
            f"without VAE: expected {units.seconds(rest.expected)}, MFU {rest.expected_mfu:.1%} of "
            f"{rest.model_flops / flop:.3f} {work} (best {units.seconds(rest.seconds)}, {rest.mfu:.1%})"
        )
    if any(part.name in parts.CANVAS_PARTS for part in report.parts):
        lines.append(
            f"canvas: +{report.canvas_share():.2%} of the expected seconds and "
            f"+{report.canvas_share('flops'):.2%} of the FLOPs of the step without it"
        )
    lines += ["", "most expensive things to fix", *(f"  {line}" for line in report.worst)]
    lines += [*advice(report), "", *report.assumptions, *([report.note] if report.note else [])]
    return "\n".join(lines) + "\n"


def outlook(report: Report) -> list[str]:
    """Lines with the best and the expected seconds and MFU, and with what makes the difference."""
    low, high = report.factors.interval(report.expected)
    (work, flop), best = units.flop_unit(report.flops), units.seconds(report.seconds)
    lines = [
        f"best by the schedule (a bound): {best}, MFU {report.mfu:.1%} = {report.model_flops / flop:.3f} {work} of the "
        f"model / ({report.devices} devices x {report.peak_flops / 1e12:.0f} TFLOP/s x {best})",
        f"expected: {units.between(report.expected, low, high)}, MFU {report.expected_mfu:.1%} "
        f"({report.mfu * report.seconds / high:.1%} to {report.mfu * report.seconds / low:.1%})",
        f"  {report.factors.note}",
    ]
    return lines + [f"  {line}" for line in report.carried]


def lasts(report: Report) -> str:
    """How long the whole training takes."""
    hours = f"{report.chip_hours:,.0f}" if report.chip_hours >= 10 else f"{report.chip_hours:.2g}"
    return (
        f"training: {report.steps:,} such steps take {units.duration(86400 * report.days)}, {hours} chip-hours "
        "(steps of smaller buckets take less)"
    )


def advice(report: Report) -> list[str]:
    """Lines of text, none where there is no advice."""
    title = "what would make it faster" if report.passed else "what would make it fit"
    return ["", f"{title}, most first (estimates)", *(f"  {line}" for line in report.advice)] if report.advice else []


def as_json(reports: list[Report]) -> str:
    """Reports as JSON."""
    return json.dumps([report.to_dict() for report in reports], indent=1) + "\n"
