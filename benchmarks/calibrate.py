"""Fits the factors of ``metacanvas plan`` on jobs that others measured, and reports them on jobs that were held out.

    python benchmarks/calibrate.py               fit, print the table, write it into docs/planning.md and the factors
                                                 into metacanvas_jax/plan/factors.json
    python benchmarks/calibrate.py --check       fit, and compare with the factors that are committed
    python benchmarks/calibrate.py --compile X   compile the jobs whose names contain X, store their features

``calibration/jobs.json`` holds the jobs: source, how each was run, what was measured, and whether it is fitted or held
out. ``calibration/features`` holds what the planner takes from their compiled programs, so that a fit compiles nothing.
Compiling needs the [tpu] extra and some minutes per job, but no TPU.
"""

# ruff: noqa: E402 (the environment comes before jax)
import argparse
import collections
import json
import math
import sys
from pathlib import Path
from typing import Any

from metacanvas_jax.plan.environment import prepare_environment

prepare_environment()

import numpy as np
from scipy.optimize import least_squares

from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import CHIPS, Chip
from metacanvas_jax.plan import calibration
from metacanvas_jax.plan.calibration import KINDS, Factors
from metacanvas_jax.plan.hlo_cost import BEST_BANDWIDTH, HOST, MEASURED_PRODUCT, Item

HERE = Path(__file__).parent
JOBS, FEATURES, PLANS = HERE / "calibration" / "jobs.json", HERE / "calibration" / "features", HERE / "plans"
DOCUMENT, MARKS = HERE.parent / "docs" / "planning.md", ("<!-- calibrate -->", "<!-- end -->")
START = 4e-6  # seconds of a product beside its work: 7x multiplies 1024^3 in 6.1 us and 2048^3 in 25 us
# Standard deviations of logarithms: how far a measured job, a part of it by a profile, and a single kernel may lie from
# what is expected, a factor of one chip from the generic one, and a generic factor from 1.
JOB, PART, KERNEL, CHIP_SPREAD, GENERIC = 0.05, 0.05, 0.15, 0.10, 0.30
CLASSES = (("small", 20e-6), ("medium", 200e-6), ("large", math.inf))  # of products, by their seconds at peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed factors, write nothing")
    parser.add_argument("--compile", metavar="TEXT", help="compile the jobs whose names contain this")
    arguments = parser.parse_args()
    data = json.loads(JOBS.read_text())
    if arguments.compile is not None:
        for job in data["jobs"]:
            if "model" in job and arguments.compile in job["name"]:
                compile_job(job)
        return 0
    rows = [row for job in data["jobs"] if (row := Row.of(job, data["kernels"])) is not None]
    found = fit(rows, data["kernel_rows"])
    print(table(rows, found))
    if arguments.check:
        if different(found, calibration.stored()):
            print(f"{calibration.FILE} does not follow from the jobs: python benchmarks/calibrate.py", file=sys.stderr)
            return 1
        return 0
    calibration.FILE.write_text(json.dumps(found, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(MARKS[0])
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{table(rows, found)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    return 0


def different(found: Any, committed: Any) -> bool:
    """Whether two trees of plain data differ by more than the last digits of a fit."""
    if isinstance(found, dict) and isinstance(committed, dict):
        return found.keys() != committed.keys() or any(different(found[key], committed[key]) for key in found)
    if isinstance(found, float) and isinstance(committed, float | int):
        return not math.isclose(found, committed, rel_tol=2e-3, abs_tol=1e-9)
    return found != committed


class Row:
    """A job as it was run: what factors multiply, by kind, the number of products, its best and measured seconds."""

    def __init__(self, job: dict[str, Any], basis: dict[str, float], starts: int, reach: float, seconds: float):
        self.job, self.basis, self.starts, self.seconds = job, basis, starts, seconds
        self.best = sum(basis.values()) - (1 - reach) * basis["collectives"]
        self.chip, self.name, self.fitted = job["chip"], job["name"], job["use"] == "fit"

    @classmethod
    def of(cls, job: dict[str, Any], kernels: dict[str, Any]) -> "Row | None":
        """The row of a job; None for one whose program has not been compiled."""
        chip = CHIPS[job["chip"]]
        found = features_of_plan(job, chip) if "plan" in job else stored_features(job)
        if found is None:
            return None
        attention = job["attention"]
        shares = kernels[attention["kernel"]][chip.name]
        basis = dict.fromkeys(KINDS, 0.0)
        basis |= {kind: found[kind] for kind in ("products", "memory", "collectives", "host")}
        for kind, share, computed in zip(KINDS[1:3], shares, attention["computed"], strict=True):
            basis[kind] = found[kind] * computed / (share * chip.flops)
        basis["attention forward"] *= attention.get("forward", 1.0)
        basis |= job.get("replace", {})
        basis = {kind: job.get("scale", {}).get(kind, 1.0) * seconds for kind, seconds in basis.items()}
        basis = {kind: job.get("more", {}).get(kind, 0.0) + seconds for kind, seconds in basis.items()}
        return cls(job, basis, found["starts"], found["reach"], measured_seconds(job))

    def expected(self, factors: Factors) -> dict[str, float]:
        return factors.expected(self.basis, self.starts)


def measured_seconds(job: dict[str, Any]) -> float:
    """Seconds of a step, which some sources state as TFLOP/s.

    MaxText's configs for v5e and v5p count causal attention whole; its later versions count half ("causal").
    """
    if "seconds" in job:
        return job["seconds"]
    from language_model import DECODERS

    tokens = job["batch"] * job["length"]
    flops = DECODERS[job["model"]].model_flops(tokens, job["length"], causal=job.get("causal", False))
    return flops / (1e12 * job["tflops"])


def stored_features(job: dict[str, Any]) -> dict[str, float] | None:
    """What ``compile_job`` stored, in seconds; FLOPs for attention."""
    path = feature_file(job)
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    kernels = {calibration.attention_kind(name): row["flops"] for name, row in stored["kernels"].items()}

    def halved(row: dict[str, Any]) -> bool:
        # Our flags compile sums of gradients over all of 16 or more devices as all-reduces. MaxText's jobs
        # reduce-scatter them, which sends half the bytes.
        return job.get("reduce_scatter", False) and row["kind"] == "all-reduce"

    share = [(1 / 2 if halved(row) else 1.0, row) for row in stored["collectives"]]
    collectives = [(x * row["seconds"], x * row["exposed"], row["devices"]) for x, row in share]
    return {
        "products": sum(row["seconds"] for row in stored["products"].values()),
        "starts": sum(row["count"] for row in stored["products"].values()),
        "attention forward": kernels["attention forward"],
        "attention backward": kernels["attention backward"],
        "memory": stored["memory"]["exposed"],
        "host": stored["host"]["exposed"],
        "collectives": sum(exposed for _, exposed, _ in collectives),
        "reach": reach(collectives, CHIPS[job["chip"]]),
    }


def reach(collectives: list[tuple[float, float, int]], chip: Chip) -> float:
    """Of the seconds of collectives that nothing hides, the share that is left if they use all links of the torus."""
    exposed = sum(row[1] for row in collectives)
    return calibration.least_collectives(collectives, chip.torus) / exposed if exposed else 1.0


def features_of_plan(job: dict[str, Any], chip: Chip) -> dict[str, float]:
    """The same of a stored plan, at the rates of ``chip`` where it was compiled for another one."""
    (plan,) = json.loads((PLANS / f"{job['plan']}.json").read_text())
    compiled = CHIPS[plan["chip"]]
    flops = collections.Counter(dict.fromkeys(KINDS, 0.0))
    other = 0.0
    for row in plan["kernels"]:
        kind = calibration.attention_kind(row["name"])
        flops[kind or "other"] += row["flops"]
        other += 0.0 if kind else row["seconds"]
    parts = plan["parts"]
    total = lambda name: sum(part[name] for part in parts)  # noqa: E731
    dense = total("flops") / plan["devices"] - sum(flops.values())
    products = total("products")
    if chip is not compiled:
        products = dense / (MEASURED_PRODUCT[chip.name] * chip.flops)
    return {
        "products": products,
        "starts": total("starts") if "starts" in parts[0] else 0,
        "attention forward": flops["attention forward"],
        "attention backward": flops["attention backward"],
        "memory": (total("memory") + other) * compiled.hbm_bandwidth / chip.hbm_bandwidth,
        "host": 0.0,
        "collectives": total("collectives") * compiled.ring / chip.ring,
        "reach": reach([(x["seconds"], x["exposed"], x["group"]) for x in plan["collectives"]], chip),
    }


def fit(rows: list[Row], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """The factors of each chip and the generic ones, none below 1; each is pulled to the generic one, that to 1."""
    chips = sorted({row.chip for row in rows if row.fitted} | {row["chip"] for row in kernels})
    place = {(chip, kind): i for i, (chip, kind) in enumerate((c, k) for c in ("", *chips) for k in KINDS)}

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = []
        for row in rows:
            if row.fitted:
                factors = Factors({k: math.exp(logs[place[row.chip, k]]) for k in KINDS}, START, 0.0, "")
                expected = row.expected(factors)
                found.append(math.log(sum(expected.values()) / row.seconds) / JOB)
                for part, seconds in row.job.get("parts", {}).items():
                    modelled = sum(s for kind, s in expected.items() if kind.startswith(part))
                    found.append(math.log(modelled / seconds) / PART)
        found += [(logs[place[row["chip"], row["kind"]]] - math.log(row["ratio"])) / KERNEL for row in kernels]
        found += [(logs[place[chip, k]] - logs[place["", k]]) / CHIP_SPREAD for chip in chips for k in KINDS]
        found += [logs[place["", k]] / GENERIC for k in KINDS]
        return np.array(found)

    solved = least_squares(residuals, np.full(len(place), 0.1), bounds=(0.0, math.log(4.0)), xtol=1e-12, ftol=1e-12)
    value = lambda chip: {k: round(math.exp(solved.x[place[chip, k]]), 4) for k in KINDS}  # noqa: E731
    measured = {row.chip for row in rows if row.fitted}
    found = {
        "chips": {chip: value(chip) for chip in chips if chip in measured},
        "generic": value(""),
        "start": START,
        "jobs": {chip: sum(row.fitted and row.chip == chip for row in rows) for chip in chips if chip in measured},
    }
    errors = [abs(math.log(ratio(row, found))) for row in rows if not row.fitted]
    return found | {"spread": round(math.expm1(max(errors, default=0.0)), 3)}


def ratio(row: Row, found: dict[str, Any]) -> float:
    """Expected over measured seconds."""
    factors = Factors(found["chips"].get(row.chip, found["generic"]), START, 0.0, "")
    return sum(row.expected(factors).values()) / row.seconds


def table(rows: list[Row], found: dict[str, Any]) -> str:
    """Factors and residuals as a table of Markdown."""
    lines = [f"| chip | {' | '.join(KINDS)} | jobs |", "|---" * (len(KINDS) + 2) + "|"]
    for chip, values in (*found["chips"].items(), ("generic", found["generic"])):
        cells = " | ".join(f"{values[kind]:.2f}" for kind in KINDS)
        lines.append(f"| {chip} | {cells} | {found['jobs'].get(chip, '-')} |")
    lines += ["", "| job | use | measured, s | best, s | best / measured | expected, s | expected / measured |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        times = ratio(row, found)
        lines.append(
            f"| {row.name} | {row.job['use']} | {row.seconds:.3f} | {row.best:.3f} | {row.best / row.seconds:.2f} | "
            f"{times * row.seconds:.3f} | {times:.2f} |"
        )
    for use in ("fit", "held out"):
        errors = [ratio(row, found) - 1 for row in rows if row.job["use"] == use]
        if errors:
            mean, worst = np.mean(np.abs(errors)), max(errors, key=abs)
            lines += ["", f"{use}: {len(errors)} jobs, mean error {mean:.1%}, bias {np.mean(errors):+.1%}, "]
            lines[-1] += f"largest {worst:+.1%}"
    return "\n".join(lines)


def feature_file(job: dict[str, Any]) -> Path:
    return FEATURES / f"{job['name'].replace(' ', '.')}.json"


def compile_job(job: dict[str, Any]) -> None:
    """Compiles a job and stores its features."""
    import language_model

    from metacanvas_jax.parallel.mesh import make_mesh, parse_mesh
    from metacanvas_jax.plan import hlo, hlo_cost
    from metacanvas_jax.plan.compile import compile_program
    from metacanvas_jax.plan.topology import find_slice

    where = find_slice(job["topology"])
    program = language_model.program(
        language_model.DECODERS[job["model"]],
        make_mesh(parse_mesh(job["mesh"]), where.devices),
        batch=round(job["batch"] * where.size),
        length=job["length"],
        remat=job["remat"],
        weights=job["weights"],
        exchange=job.get("exchange", "gather"),
    )
    try:
        compiled = compile_program(program, where)
    except UserError as error:
        print(f"{job['name']}: {error}", file=sys.stderr)
        return
    machine = hlo_cost.Machine(where.chip, where.size, lambda kernel: 1.0)
    found = features(hlo_cost.items(hlo.parse(compiled.text), machine), where.chip)
    found |= {"name": job["name"], "peak_gib": compiled.peak / 2**30, "compile_seconds": compiled.seconds}
    FEATURES.mkdir(exist_ok=True)
    feature_file(job).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{job['name']}: stored", file=sys.stderr)


def features(items: list[Item], chip: Chip) -> dict[str, Any]:
    """What a fit needs of a compiled program: sums on one device. ``ideal`` is the roofline."""
    sums: dict[tuple[str, ...], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for item in items:
        key: tuple[str, ...] = (item.sort,)
        if item.sort == "product":
            key = ("product", next(name for name, most in CLASSES if item.flops / item.count / chip.flops < most))
        elif item.sort == "kernel":
            key = ("kernel", item.name.rstrip("0123456789."))
        elif item.sort == "collective":
            key = ("collective", item.kind, str(item.group), item.overlap)
        elif item.kind == HOST:
            key = ("host",)
        row = sums[key]
        row["count"] += item.count
        row["flops"] += item.flops
        row["bytes"] += item.bytes
        row["seconds"] += item.seconds
        row["exposed"] += item.exposed
        row["ideal"] += max(item.flops / chip.flops, item.bytes / (BEST_BANDWIDTH * chip.hbm_bandwidth))
    empty = dict.fromkeys(("count", "flops", "bytes", "seconds", "exposed", "ideal"), 0.0)
    rows = {key: empty | dict(row) for key, row in sums.items()}
    return {
        "products": {key[1]: row for key, row in rows.items() if key[0] == "product"},
        "kernels": {key[1]: row for key, row in rows.items() if key[0] == "kernel"},
        "memory": rows.get(("memory",), empty),
        "host": rows.get(("host",), empty),
        "collectives": [
            {"kind": key[1], "devices": int(key[2]), "overlap": key[3]} | row
            for key, row in rows.items()
            if key[0] == "collective"
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
