"""The report of ``metacanvas plan`` on one program and one slice, made from the costs; as a table or as JSON."""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from metacanvas_jax.hardware import GIB, GPUS
from metacanvas_jax.plan import gpu_cost, parts, units
from metacanvas_jax.plan.compile import Compiled
from metacanvas_jax.plan.hlo_cost import Item
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.topology import Slice
from metacanvas_jax.train import flops
from metacanvas_jax.train.flops import Count

ASSUMPTIONS = (
    "Times are estimates, not measurements: products by the compiler's cycles, other operations by HBM bytes at 85 % "
    "of the bandwidth, kernels by their static schedule, collectives by bytes over two links of the torus",
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

    @property
    def seconds(self) -> float:
        """The sum over products, kernels, memory and collectives."""
        return self.products + self.kernels + self.memory + self.collectives

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of products, kernels, memory and collectives, and of all."""
        return self.products, self.kernels, self.memory, self.collectives, self.seconds


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
    none), ``advice`` what would make it fit or faster (`plan/advice.py`).
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

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on."""
        return (*gpu_cost.ASSUMPTIONS, *ASSUMPTIONS[1:3]) if self.chip in GPUS else ASSUMPTIONS

    @property
    def days(self) -> float:
        """The estimated time of a training whose steps are all such."""
        return self.steps * self.seconds / 86400

    @property
    def chip_hours(self) -> float:
        """That time on every chip."""
        return 24 * self.days * self.devices

    @property
    def seconds(self) -> float:
        """The estimated time of one step."""
        return sum(part.seconds for part in self.parts)

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
        """Model FLOPs utilisation: the share of the slice's peak FLOP/s."""
        return self.model_flops / (self.devices * self.peak_flops * self.seconds) if self.seconds else 0.0

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

    def canvas_share(self, what: str = "seconds") -> float:
        """The cost of the canvas relative to the step without it, in "seconds" or "flops"."""
        of_canvas = sum(getattr(part, what) for part in self.parts if part.name in parts.CANVAS_PARTS)
        rest = sum(getattr(part, what) for part in self.parts) - of_canvas
        return of_canvas / rest if rest else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        derived = {
            "seconds": self.seconds,
            "model_flops": self.model_flops,
            "mfu": self.mfu,
            "mfu_without_vae": self.without(parts.VAE).mfu,
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


def make_report(
    config: str, program: Program, where: Slice, compiled: Compiled, costs: list[Item], counts: list[Count]
) -> Report:
    """The report of a program that compiled."""
    held = sum(program.held.values())
    memory = dict(program.held) | {"activations": max(compiled.peak - held, 0.0)}
    return Report(
        config=config,
        program=program.name,
        topology=where.name,
        chip=where.chip.name,
        devices=where.size,
        mesh=dict(program.mesh.shape),
        samples=program.samples,
        passed=True,
        verdict="PASS",
        memory=memory,
        needed=compiled.peak,
        limit=where.limit,
        parts=_parts(costs, counts, where.size),
        kernels=_kernels(costs),
        collectives=_collectives(costs),
        worst=tuple(worst(costs, where.chip.flops)),
        peak_flops=where.chip.flops,
        host_bytes=compiled.host,
        compile_seconds=compiled.seconds,
        recomputed=sum(item.exposed for item in costs if parts.is_recomputed(item.scope, item.name)),
    )


def failed_report(config: str, program: Program, where: Slice, message: str, needed: float) -> Report:
    """The report of a program that does not fit."""
    return Report(
        config=config,
        program=program.name,
        topology=where.name,
        chip=where.chip.name,
        devices=where.size,
        mesh=dict(program.mesh.shape),
        samples=program.samples,
        passed=False,
        verdict=f"FAIL: {message}",
        memory=dict(program.held) | {"activations": max(needed - sum(program.held.values()), 0.0)},
        needed=needed,
        limit=where.limit,
        peak_flops=where.chip.flops,
    )


def _parts(costs: list[Item], counts: list[Count], devices: int) -> tuple[Part, ...]:
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    columns = {"product": "products", "kernel": "kernels", "memory": "memory", "collective": "collectives"}
    for item in costs:
        row = sums[parts.part_of(item.scope, item.sort)]
        row["flops"] += item.flops * devices
        row[columns[item.sort]] += item.exposed
    for count in counts:
        row = sums[parts.part_of(count.scope, "kernel" if count.kernel else "product")]
        row["traced_flops"] += count.flops
        row["model_flops"] += flops.model_flops([count])
    names = [field.name for field in dataclasses.fields(Part) if field.name != "name"]
    rows = [Part(name, **{key: row[key] for key in names}) for name, row in sums.items()]
    return tuple(sorted(rows, key=lambda part: -part.seconds))


def _kernels(costs: list[Item]) -> tuple[Kernel, ...]:
    sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for item in costs:
        if item.sort == "kernel":
            row = sums[re.sub(r"[.\d]+$", "", item.name), parts.part_of(item.scope, item.sort)]
            for i, value in enumerate((item.count, item.flops, item.seconds)):
                row[i] += value
    rows = [Kernel(*key, int(row[0]), *row[1:]) for key, row in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _collectives(costs: list[Item]) -> tuple[Collective, ...]:
    sums: dict[tuple[str, int, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for item in costs:
        if item.sort == "collective":
            row = sums[item.kind, item.group, item.overlap]
            for i, value in enumerate((item.count, item.bytes, item.seconds, item.exposed)):
                row[i] += value
    rows = [Collective(*key, int(row[0]), *row[1:]) for key, row in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def worst(costs: list[Item], peak: float, count: int = 5) -> list[str]:
    """The largest avoidable costs: seconds beyond the products at peak FLOP/s, by cause and part."""
    lost: collections.Counter[str] = collections.Counter()
    for item in costs:
        part = parts.part_of(item.scope, item.sort)
        if item.sort == "collective":
            how = "partly overlapped" if item.overlap == "beside" else "not overlapped"
            lost[f"{part}: {item.kind} over {item.group} devices, {how}"] += item.exposed
        elif item.sort == "memory":
            lost[f"{part}: reading and writing HBM outside of products"] += item.exposed
        else:
            again = parts.is_recomputed(item.scope, item.name)
            if again:
                lost[f"{part}: recomputed in the backward pass"] += item.seconds
            else:
                what = "kernels" if item.sort == "kernel" else "products"
                lost[f"{part}: {what} below peak FLOP/s"] += item.seconds - item.flops / peak
    return [f"{units.seconds(seconds)}  {name}" for name, seconds in lost.most_common(count) if seconds > 0]


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
    time = "seconds" if second == 1 else time
    lines += [
        "",
        f"{'part':<20}{work:>10}{'/ written':>10}{'products':>10}{'kernels':>10}{'memory':>10}{'exposed':>10}"
        f"{time:>10}{'share':>8}",
    ]
    for part in report.parts:
        ratio = f"{part.flops / part.traced_flops:.3f}" if part.traced_flops else "-"
        lines.append(
            f"{part.name:<20}{part.flops / flop:>10.3f}{ratio:>10}"
            + "".join(f"{value / second:>10.4f}" for value in part.times)
            + f"{part.seconds / report.seconds:>8.1%}"
        )
    lines.append(
        f"{'step':<20}{report.flops / flop:>10.3f}{report.flops_ratio:>10.3f}"
        + "".join(
            f"{sum(values) / second:>10.4f}" for values in zip(*(part.times for part in report.parts), strict=True)
        )
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
    lines += [
        "",
        f"MFU {report.mfu:.1%} = {report.model_flops / flop:.3f} {work} of the model / ({report.devices} devices x "
        f"{report.peak_flops / 1e12:.0f} TFLOP/s x {units.seconds(report.seconds)})",
    ]
    if report.steps:
        lines.append(lasts(report))
    if report.runs_vae:
        rest = report.without(parts.VAE)
        lines.append(f"without VAE: {rest.seconds:.3f} s, MFU {rest.mfu:.1%} of {rest.model_flops / 1e15:.3f} PFLOP")
    if any(part.name in parts.CANVAS_PARTS for part in report.parts):
        lines.append(
            f"canvas: +{report.canvas_share():.2%} of the seconds and +{report.canvas_share('flops'):.2%} of the FLOPs "
            "of the step without it"
        )
    lines += ["", "most expensive things to fix", *(f"  {line}" for line in report.worst)]
    lines += [*advice(report), "", *report.assumptions]
    return "\n".join(lines) + "\n"


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
