"""Makes the report of a program that compiled from the costs of its operations."""

import collections
import dataclasses
import re

from metacanvas_jax.plan import parts, units
from metacanvas_jax.plan.compile import Compiled
from metacanvas_jax.plan.hlo_cost import HOST, Item
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.report import Collective, Kernel, Part, Report, about
from metacanvas_jax.plan.topology import Slice
from metacanvas_jax.train import flops
from metacanvas_jax.train.flops import Count


def make_report(
    config: str, program: Program, where: Slice, compiled: Compiled, costs: list[Item], counts: list[Count]
) -> Report:
    """The report of a program that compiled."""
    held = sum(program.held.values())
    memory = dict(program.held) | {"activations": max(compiled.peak - held, 0.0)}
    return Report(
        **about(config, program, where),
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


def _parts(costs: list[Item], counts: list[Count], devices: int) -> tuple[Part, ...]:
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    columns = {"product": "products", "kernel": "kernels", "memory": "memory", "collective": "collectives"}
    for item in costs:
        row = sums[parts.part_of(item.scope, item.sort)]
        row["flops"] += item.flops * devices
        row[columns[item.sort]] += item.exposed
        row["host"] += item.exposed if item.kind == HOST else 0.0
        row["starts"] += item.count if item.sort == "product" else 0
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
