"""What a compiled step costs on one device: every operation with its repetitions, FLOPs, bytes, part and seconds.

Loops are multiplied out (the compiler's own ``cost_analysis`` counts their bodies once). Seconds are reckoned thus:

- *products* (fusions with a matrix product or convolution): the compiler's cycles over the clock, held between what
  peak FLOP/s and bandwidth allow at best and 60 % of peak plus the memory traffic: outside of large products the
  cycles over-state several times;
- *memory* (everything else): HBM bytes at 85 % of the bandwidth;
- *kernels* (Pallas): their declared FLOPs at the share of peak that the static schedule of the kernel reaches
  (``kernel_shares``), or their declared bytes, whichever takes longer;
- *collectives*: bytes on the wire of one device over two links of the torus, or over the data-centre network where
  slices take part; of one that runs beside other operations only what these do not cover.

Nothing here was measured on a TPU.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable

from metacanvas_jax.hardware import Chip
from metacanvas_jax.plan import hlo
from metacanvas_jax.plan.hlo import COLLECTIVES, Computation, Module, Op

FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("iota", "opt-barrier", "custom-call", "infeed", "outfeed", "domain", "add-dependency", "get-dimension-size"),
}
BEST_BANDWIDTH = 0.85
LEAST_PRODUCT_SHARE = 0.6
HOST_BANDWIDTH = 16e9  # bytes per second and device between HBM and the memory of the host


@dataclasses.dataclass(frozen=True)
class Item:
    """One operation over a whole step: all ``count`` runs of it together, on one device.

    ``seconds`` is what it takes, ``exposed`` the part that nothing else covers (all of it but for asynchronous
    collectives and copies). ``group`` and ``overlap`` ("alone", "beside") belong to collectives, ``bytes`` are then
    those on the wire.
    """

    name: str
    scope: str
    sort: str
    count: int
    flops: float
    bytes: float
    seconds: float
    exposed: float
    kind: str = ""
    group: int = 0
    overlap: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What seconds are reckoned with: the chip, devices per slice, and the share of peak FLOP/s of each kernel."""

    chip: Chip
    per_slice: int
    kernel_share: Callable[[str], float]


def items(module: Module, machine: Machine) -> list[Item]:
    """All operations of a step that cost something."""
    walk = _Walk(module, machine)
    walk.run(module.entry, 1)
    return walk.items


class _Walk:
    """Goes through computations in the order they run, multiplying loops out."""

    def __init__(self, module: Module, machine: Machine):
        self.module, self.machine = module, machine
        self.items: list[Item] = []

    def run(self, name: str, times: int) -> float:
        """Seconds of one run of a computation."""
        computation = self.module.computations[name]
        elapsed = 0.0
        started: dict[str, tuple[float, Op]] = {}
        fused: dict[str, list] = {}  # by channel: a collective, its computation, is it a scatter, seconds beside others
        for op in computation.values():
            if op.kind == "while":
                trips = hlo.trip_count(self.module, op)
                elapsed += trips * self.run(op.named("body") or "", times * trips)
            elif op.kind == "conditional":
                elapsed += self._dearest(op.branches(), times)
            elif op.kind == "call":
                elapsed += self.run(op.named("to_apply") or "", times)
            elif op.kind.endswith("-start"):
                started[op.name] = (elapsed, op)
            elif op.kind.endswith("-done"):
                begun, start = started.pop(op.operands[0], (elapsed, None)) if op.operands else (elapsed, None)
                if start is not None:
                    elapsed += self._asynchronous(start, computation, times, elapsed - begun)
            elif op.kind in COLLECTIVES:
                elapsed += self._collective(op, computation, times, covered=0.0, overlap="alone")
            elif op.kind == "custom-call" and "tpu_custom_call" in op.attributes:
                elapsed += self._kernel(op, computation, times)
            elif op.kind not in FREE:
                seconds = self._plain(op, computation, times)
                elapsed += seconds
                if op.kind == "fusion":
                    self._fused_collectives(op, fused, seconds)
        for op, inner, is_scatter, covered in fused.values():
            overlap = "beside" if covered else "alone"
            elapsed += self._collective(op, inner, times, covered=covered, overlap=overlap, is_scatter=is_scatter)
        return elapsed

    def _dearest(self, branches: list[str], times: int) -> float:
        # Which branch runs is not known: the dearest one is reckoned, and only it is kept.
        best, kept = -1.0, []
        before = self.items
        for branch in branches:
            self.items = []
            seconds = self.run(branch, times)
            if seconds > best:
                best, kept = seconds, self.items
        self.items = before + kept
        return max(best, 0.0)

    def _add(self, item: Item) -> float:
        self.items.append(item)
        return item.exposed / item.count

    def _plain(self, op: Op, computation: Computation, times: int) -> float:
        chip = self.machine.chip
        moved = hlo.traffic(self.module, computation, op)
        flops = hlo.product_flops(self.module, {op.name: op, **_operands(computation, op)})
        memory = moved / (BEST_BANDWIDTH * chip.hbm_bandwidth)
        if not flops:
            return self._add(self._item(op, "memory", times, 0.0, moved, memory)) if moved else 0.0
        least = max(flops / chip.flops, moved / chip.hbm_bandwidth)
        most = flops / chip.flops / LEAST_PRODUCT_SHARE + memory
        seconds = min(max(op.cycles / chip.clock, least), most) if op.cycles else most
        return self._add(self._item(op, "product", times, flops, moved, seconds))

    def _item(self, op: Op, sort: str, times: int, flops: float, moved: float, seconds: float) -> Item:
        scope = op.scope
        if not scope and op.kind == "fusion":
            scope = next((x.scope for x in reversed(list(self.module.callee(op).values())) if x.scope), "")
        whole = (flops * times, moved * times, seconds * times, seconds * times)
        return Item(op.name, scope, sort, times, *whole, op.kind)

    def _kernel(self, op: Op, computation: Computation, times: int) -> float:
        chip = self.machine.chip
        declared = re.search(
            r'"cost_estimate":\{"flops":"(-?\d+)","transcendentals":"-?\d+","bytes_accessed":"(-?\d+)"', op.attributes
        )
        flops = max(float(declared.group(1)), 0.0) if declared else 0.0
        moved = max(float(declared.group(2)), 0.0) if declared else 0.0
        moved = moved or hlo.hbm_bytes(op.type) + hlo.operand_bytes(computation, op)
        name = re.sub(r"[.\d]+$", "", op.name)
        seconds = flops / (chip.flops * self.machine.kernel_share(name))
        seconds = max(seconds, moved / (BEST_BANDWIDTH * chip.hbm_bandwidth))
        return self._add(self._item(op, "kernel", times, flops, moved, seconds))

    def _asynchronous(self, start: Op, computation: Computation, times: int, covered: float) -> float:
        base = start.kind.removesuffix("-start")
        if base in COLLECTIVES:
            return self._collective(start, computation, times, covered=covered, overlap="beside")
        if base in ("call", "async"):  # offloaded to a core of its own
            inner = self.module.computations.get(start.named("to_apply") or start.named("calls") or "", {})
            seconds = 0.0
            for op in inner.values():
                if op.kind.removesuffix("-start") in COLLECTIVES:
                    seconds += self._collective(op, inner, times, covered=covered, overlap="beside")
            return seconds
        moved = hlo.first_bytes(start.type)
        if not moved or not (hlo.hbm_bytes(start.type) or hlo.host_bytes(start.type)):
            return 0.0
        bandwidth = HOST_BANDWIDTH if hlo.host_bytes(start.type) else BEST_BANDWIDTH * self.machine.chip.hbm_bandwidth
        item = self._item(start, "memory", times, 0.0, moved, moved / bandwidth)
        exposed = max(moved / bandwidth - covered, 0.0) * times
        return self._add(dataclasses.replace(item, exposed=exposed, overlap="beside"))

    def _fused_collectives(self, op: Op, fused: dict[str, list], seconds: float) -> None:
        """A collective that was fused shows in a start fusion, in the fusions it runs beside and in a done fusion."""
        name = op.named("calls") or ""
        inner = self.module.computations[name]
        for x in inner.values():
            if x.kind.removesuffix("-start") not in COLLECTIVES:
                continue
            match = re.search(r"channel_id=(\d+)", x.attributes)
            if not x.scope and op.scope:
                x = dataclasses.replace(x, attributes=f'{x.attributes}, metadata={{op_name="{op.scope}"}}')
            entry = fused.setdefault(match.group(1) if match else x.name, [x, inner, "all-reduce-scatter" in name, 0.0])
            if name.startswith("async_collective_fusion"):
                entry[3] += seconds

    def _collective(
        self,
        op: Op,
        computation: Computation,
        times: int,
        *,
        covered: float,
        overlap: str,
        is_scatter: bool = False,
    ) -> float:
        kind = "reduce-scatter" if is_scatter else op.kind.removesuffix("-start")
        groups = hlo.device_groups(op)
        n = groups.shape[1]
        if n == 1:
            return 0.0
        local = sum(hlo.total_bytes(computation[x].type) for x in op.operands if x in computation)
        wire = {
            "all-gather": local * (n - 1),
            "all-reduce": 2 * local * (n - 1) / n,
            "collective-permute": local,
            "ragged-all-to-all": local,
        }.get(kind, local * (n - 1) / n)
        chip = self.machine.chip
        between = len({int(x) // self.machine.per_slice for x in groups[0]}) > 1
        seconds = wire / (chip.network if between else chip.ring)
        item = self._item(op, "collective", times, 0.0, wire, seconds)
        exposed = max(seconds - covered, 0.0) * times
        group = 2 if kind == "collective-permute" else n
        return self._add(dataclasses.replace(item, kind=kind, group=group, overlap=overlap, exposed=exposed))


def _operands(computation: Computation, op: Op) -> Computation:
    known = (computation[name] for name in op.operands if name in computation)
    return {x.name: dataclasses.replace(x, kind="parameter") for x in known}


def total(costs: Iterable[Item], value: Callable[[Item], float], key: Callable[[Item], str]) -> dict[str, float]:
    """Sums of a value by a key, largest first."""
    sums: collections.Counter[str] = collections.Counter()
    for item in costs:
        sums[key(item)] += value(item)
    return dict(sums.most_common())
