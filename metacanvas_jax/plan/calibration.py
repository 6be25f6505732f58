"""Expected seconds of a planned step: its best seconds by kind, times factors that were fitted on measured jobs.

The best seconds are those of the compiled program (``hlo_cost.py``), with all links of the torus in use: no measured
job was faster. The factors multiply the same seconds with collectives over two links. By how much a chip takes longer
is data, ``factors.json``, which ``benchmarks/calibrate.py`` fits and ``docs/planning.md`` explains.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metacanvas_jax.hardware import GPUS
from metacanvas_jax.plan import units

KINDS = ("products", "attention forward", "attention backward", "memory", "collectives", "host")
"""What seconds are spent on. "memory" is everything that is bound by HBM: other operations, and kernels that are no
softmax attention. "host" is copies to and from the host's memory. "collectives" and "host" are what nothing hides."""
FILE = Path(__file__).with_name("factors.json")
SOFTMAX_KERNEL = re.compile(r"flash|splash")
BACKWARD_KERNEL = re.compile(r"bwd|backward|dkv|dq")

Seconds = Mapping[str, float]
"""By kind."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the best seconds of a chip are multiplied with, by kind; ``start`` is added to every product, in seconds.

    ``note`` says where they come from. ``spread`` is the largest relative error over the jobs that were held out of the
    fit: expected seconds are given as the range from ``1 / (1 + spread)`` to ``1 + spread`` times.
    """

    values: Seconds
    start: float
    spread: float
    note: str

    def expected(self, best: Seconds, starts: int = 0) -> dict[str, float]:
        """Expected seconds by kind; ``starts`` is the number of products."""
        found = {kind: seconds * self.values[kind] for kind, seconds in best.items()}
        return found | {"products": found.get("products", 0.0) + starts * self.start}

    def interval(self, seconds: float) -> tuple[float, float]:
        """The range around expected seconds."""
        return seconds / (1 + self.spread), seconds * (1 + self.spread)


@functools.cache
def stored(path: Path = FILE) -> dict[str, Any]:
    """The file of factors."""
    return json.loads(path.read_text())


def factors_of(chip: str) -> Factors:
    """The factors of a chip by its name: fitted ones, the generic ones of other TPUs, or 1 for GPUs."""
    data = stored()
    if chip in GPUS:
        note = (
            "no training step on a GPU has been compared yet: expected seconds are those of the roofline, whose shares "
            "were measured on one product, one copy and one attention; take them for a lower bound"
        )
        return Factors(dict.fromkeys(KINDS, 1.0), 0.0, data["spread"], note)
    fitted = data["chips"].get(chip)
    if fitted is None:
        note = f"no job on {chip} was measured: generic factors, the common part of those of {', '.join(data['chips'])}"
        return Factors(data["generic"], data["start"], data["spread"], note)
    note = f"factors fitted on {data['jobs'][chip]} measured jobs on {chip} (benchmarks/calibrate.py)"
    return Factors(fitted, data["start"], data["spread"], note)


def attention_kind(kernel: str) -> str | None:
    """The kind of a Pallas kernel by its name; None for kernels that are no softmax attention."""
    if not SOFTMAX_KERNEL.search(kernel):
        return None
    return f"attention {'backward' if BACKWARD_KERNEL.search(kernel) else 'forward'}"


def basis(
    products: float, kernels: float, memory: float, collectives: float, host: float, attention: Iterable[tuple]
) -> dict[str, float]:
    """What the factors multiply: seconds of a part of a step by kind. ``attention`` are (name of a kernel, seconds)."""
    found: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0.0))
    for name, seconds in attention:
        if (kind := attention_kind(name)) is not None:
            found[kind] += seconds
    rest = max(kernels - found["attention forward"] - found["attention backward"], 0.0)
    found.update({"products": products, "memory": memory - host + rest, "collectives": collectives, "host": host})
    return dict(found)


def least_collectives(rows: Iterable[tuple[float, float, int]], torus: int) -> float:
    """The seconds that nothing hides, if every collective used all links of its devices.

    ``rows`` are (seconds over two links, those of them that nothing hides, devices of a group). Two devices have one
    link, whichever else there are.
    """
    return sum(
        exposed if devices == 2 else max(seconds / torus - (seconds - exposed), 0.0)
        for seconds, exposed, devices in rows
    )


def sums(rows: Iterable[Seconds]) -> dict[str, float]:
    """Seconds by kind, summed."""
    total: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0.0))
    for row in rows:
        total.update(row)
    return dict(total)


def carried(best: Seconds, expected: Seconds, factors: Factors) -> list[str]:
    """Lines that say which factors make the difference between best and expected seconds, the largest first."""
    more = {kind: expected[kind] - best[kind] for kind in KINDS}
    least = 0.02 * math.fsum(more.values())
    time, second = units.time_unit(math.fsum(expected.values()))
    links = {"collectives": ", over two links"}
    return [
        f"{kind} x {factors.values[kind]:.2f}{links.get(kind, '')}: {seconds / second:+.3f} {time}"
        for kind, seconds in sorted(more.items(), key=lambda pair: -pair[1])
        if seconds > least
    ]
