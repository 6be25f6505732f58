"""The estimated cost of a compiled step on one TPU device: repetitions, FLOPs, bytes and seconds of every operation.

The body of a loop counts once per iteration (the compiler's own ``cost_analysis`` counts it once). Seconds are
estimated as follows:

- *products* (fusions with a matrix product or convolution): the compiler's cycles divided by the clock. The lower limit
  is the time at peak FLOP/s or at full bandwidth. The upper limit is the time at 60 % of peak plus that of the memory
  traffic, because the cycles of small products are several times too large. On v5e, v6e and tpu7x the cycles of
  all products are too large. There the upper limit is the longer of two times: at the share of peak that large products
  reach on hardware (``MEASURED_PRODUCT``), and that of the memory traffic. On v5p the cycles are a little too large
  (``CYCLES``).
- *memory* (everything else): HBM bytes at 85 % of the bandwidth.
- *kernels* (Pallas): the longer of two times. One is that of the declared FLOPs at the share of peak which the kernel's
  static schedule reaches (``kernel_share``). The other is that of the declared bytes.
- *collectives*: bytes on the wire of one device over two links of the torus (one between two devices), or over the
  data-centre network between slices. Only the time that is not hidden behind other operations counts.

Apart from collectives, which may use more links, these are the best times that the compiled program allows.
``calibration.py`` makes best and expected times of them.
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
CYCLES = {"v5p": 0.93}  # of the compiler's cycles that products take at best; two measured jobs need less than 0.98
# Shares of peak: of a product of 8192^3 and one of 16384^3; on v5e a whole training step was measured at 89 %.
MEASURED_PRODUCT = {"v5e": 0.95, "v6e": 0.90, "tpu7x": 0.83}
HOST = "host copy"  # the ``kind`` of an item that moves data between HBM and the memory of the host
HOST_BANDWIDTH = 16e9  # bytes per second and device between HBM and the memory of the host


@dataclasses.dataclass(frozen=True)
class Item:
    """One operation over a whole step: the sum of its ``count`` runs on one device.

    ``seconds`` is its time. ``exposed`` is the time not hidden behind other operations; it is shorter for asynchronous
    collectives and copies only. For collectives ``bytes`` are those on the wire, ``group`` is the number of devices,
    and ``overlap`` is "alone" or "beside" (other operations).
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
    """The data for estimating seconds: the chip, devices per slice, and the share of peak FLOP/s of each kernel."""

    chip: Chip
    per_slice: int
    kernel_share: Callable[[str], float]


def items(module: Module, machine: Machine) -> list[Item]:
    """All operations of a step with a cost above zero."""
    walk = Walk(module, machine)
    walk.run(module.entry, 1)
    return walk.items


class Walk:
    """Visits computations in the order of their execution and multiplies the bodies of loops by their iterations."""

    def __init__(self, module: Module, machine: Machine):
        self.module, self.machine = module, machine
        self.items: list[Item] = []

    def run(self, name: str, times: int) -> float:
        """Seconds of one run of a computation."""
        computation = self.module.computations[name]
        elapsed = 0.0
        started: dict[str, tuple[float, Op]] = {}
        fused: dict[str, list] = {}  # by channel: collective, its computation, is it a scatter, seconds beside others
        for op in computation.values():
            if op.kind == "while":
                trips = hlo.trip_count(self.module, op)
                elapsed += trips * self.run(op.named("body") or "", times * trips)
            elif op.kind == "conditional":
                elapsed += self._most_expensive(op.branches(), times)
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
            elif op.kind == "custom-call":
                elapsed += self.called(op, computation, times)
            elif op.kind not in FREE:
                seconds = self.plain(op, computation, times)
                elapsed += seconds
                if op.kind == "fusion":
                    self._fused_collectives(op, fused, seconds)
        for op, inner, is_scatter, covered in fused.values():
            overlap = "beside" if covered else "alone"
            elapsed += self._collective(op, inner, times, covered=covered, overlap=overlap, is_scatter=is_scatter)
        return elapsed

    def _most_expensive(self, branches: list[str], times: int) -> float:
        # Which branch runs is unknown: only the most expensive one is counted.
        best, kept = -1.0, []
        before = self.items
        for branch in branches:
            self.items = []
            seconds = self.run(branch, times)
            if seconds > best:
                best, kept = seconds, self.items
        self.items = before + kept
        return max(best, 0.0)

    def add(self, item: Item) -> float:
        """Keeps an item; returns the seconds of one of its runs."""
        self.items.append(item)
        return item.exposed / item.count

    def called(self, op: Op, computation: Computation, times: int) -> float:
        """Seconds of one call of code that the compiler did not write: of a Pallas kernel; other calls are free."""
        return self._kernel(op, computation, times) if "tpu_custom_call" in op.attributes else 0.0

    def plain(self, op: Op, computation: Computation, times: int) -> float:
        """Seconds of one run of an operation that is no loop, call or collective."""
        chip = self.machine.chip
        moved = hlo.traffic(self.module, computation, op)
        flops = product_flops(self.module, op, computation)
        memory = moved / (BEST_BANDWIDTH * chip.hbm_bandwidth)
        if not flops:
            return self.add(self.item(op, "memory", times, 0.0, moved, memory)) if moved else 0.0
        least = max(flops / chip.flops, moved / chip.hbm_bandwidth)
        if chip.name in MEASURED_PRODUCT:
            most = max(flops / chip.flops / MEASURED_PRODUCT[chip.name], memory)
        else:
            most = flops / chip.flops / LEAST_PRODUCT_SHARE + memory
        cycles = op.cycles * CYCLES.get(chip.name, 1.0)
        seconds = min(max(cycles / chip.clock, least), most) if cycles else most
        return self.add(self.item(op, "product", times, flops, moved, seconds))

    def item(self, op: Op, sort: str, times: int, flops: float, moved: float, seconds: float) -> Item:
        """The item of an operation; FLOPs, bytes and seconds are those of one run."""
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
        return self.add(self.item(op, "kernel", times, flops, moved, seconds))

    def _asynchronous(self, start: Op, computation: Computation, times: int, covered: float) -> float:
        base = start.kind.removesuffix("-start")
        if base in COLLECTIVES:
            return self._collective(start, computation, times, covered=covered, overlap="beside")
        if base in ("call", "async"):  # offloaded to a separate core
            inner = self.module.computations.get(start.named("to_apply") or start.named("calls") or "", {})
            seconds = 0.0
            for op in inner.values():
                if op.kind.removesuffix("-start") in COLLECTIVES:
                    seconds += self._collective(op, inner, times, covered=covered, overlap="beside")
            return seconds
        moved = hlo.copied_bytes(start)
        if not moved or not (hlo.hbm_bytes(start.type) or hlo.host_bytes(start.type)):
            return 0.0
        bandwidth = HOST_BANDWIDTH if hlo.host_bytes(start.type) else BEST_BANDWIDTH * self.machine.chip.hbm_bandwidth
        item = self.item(start, "memory", times, 0.0, moved, moved / bandwidth)
        exposed = max(moved / bandwidth - covered, 0.0) * times
        kind = HOST if hlo.host_bytes(start.type) else item.kind
        return self.add(dataclasses.replace(item, exposed=exposed, overlap="beside", kind=kind))

    def _fused_collectives(self, op: Op, fused: dict[str, list], seconds: float) -> None:
        """A fused collective appears in a start fusion, in the fusions that run beside it, and in a done fusion."""
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
        group = 2 if kind == "collective-permute" else n
        between = len({int(x) // self.machine.per_slice for x in groups[0]}) > 1
        seconds = wire / (chip.network if between else chip.pair if group == 2 else chip.ring)
        item = self.item(op, "collective", times, 0.0, wire, seconds)
        exposed = max(seconds - covered, 0.0) * times
        return self.add(dataclasses.replace(item, kind=kind, group=group, overlap=overlap, exposed=exposed))


def product_flops(module: Module, op: Op, computation: Computation) -> float:
    """FLOPs of the products of one operation, those inside a fusion included."""
    known = (computation[name] for name in op.operands if name in computation)
    operands = {x.name: dataclasses.replace(x, kind="parameter") for x in known}
    return hlo.product_flops(module, {op.name: op, **operands})


def total(costs: Iterable[Item], value: Callable[[Item], float], key: Callable[[Item], str]) -> dict[str, float]:
    """The sums of ``value`` for each ``key``, largest first."""
    sums: collections.Counter[str] = collections.Counter()
    for item in costs:
        sums[key(item)] += value(item)
    return dict(sums.most_common())
