"""Plans every full-size config on its TPU slices and two jobs that others measured; writes docs/performance.md.

    python benchmarks/plan_all.py [--only TEXT] [--out docs/performance.md]

Compilations are remembered (``metacanvas_jax/plan/compile.py``), so a second run takes what changed. Needs the [tpu]
extra; no TPU.
"""

# ruff: noqa: E402 (the environment comes before jax)
import argparse
import sys
from pathlib import Path

from metacanvas_jax.plan.environment import prepare_environment

prepare_environment()

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.plan.published import JOBS as PUBLISHED
from metacanvas_jax.plan.published import Measured
from metacanvas_jax.plan.report import ASSUMPTIONS, Report, table
from metacanvas_jax.plan.shipped import JOBS, run_job
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import GIB, find_slice


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def page(reports: list[Report], truths: list[tuple[Measured, Report]], failures: list[str]) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance, as far as it can be known without a TPU",
        "",
        "Written by `make plan-all` (`benchmarks/plan_all.py`): every full-size config is compiled ahead of time for",
        "its TPU slices and reckoned from the compiled program. `metacanvas plan --config C --topology T` prints the",
        "same for one config.",
        "",
        *(f"- {note}." for note in ASSUMPTIONS),
        "",
        "## Configs",
        "",
        "| config | program | slice | mesh | samples | fits | peak GiB | s per step | MFU | FLOPs / written | canvas |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(report) for report in reports]
    if failures:
        lines += ["", "Not planned:", "", *(f"- {failure}" for failure in failures)]
    if truths:
        lines += [
            "",
            "## Jobs that others measured",
            "",
            "| job | published | estimate | ratio | assumptions |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {truth.name} | {truth.seconds:.3f} s ({truth.source}) | {report.seconds:.3f} s | "
            f"{report.seconds / truth.seconds:.2f} | {truth.assumptions} |"
            for truth, report in truths
        ]
    lines += ["", "## In detail"]
    for report in [*reports, *(report for _, report in truths)]:
        name = f"{report.config}: {report.program}, {report.topology}"
        lines += ["", f"<details><summary>{name}</summary>", "", "```", table(report).rstrip(), "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def row(report: Report) -> str:
    """One line of the table of configs."""
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "-"
    cells = [report.config, report.program, report.topology, mesh, str(report.samples)]
    cells += ["PASS" if report.passed else "FAIL", f"{report.needed / GIB:.1f} of {report.limit / GIB:.1f}"]
    if report.passed:
        canvas = report.canvas_share()
        cells += [f"{report.seconds:.3f}", f"{report.mfu:.1%}", f"{report.flops_ratio:.3f}"]
        cells.append(f"+{canvas:.2%} s, +{report.canvas_share('flops'):.2%} FLOPs" if canvas else "-")
    else:
        cells += ["-"] * 4
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose config and slice contain this text")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args()
    reports, failures = [], []
    for job in JOBS:
        if arguments.only in f"{job.config} {job.topology}":
            try:
                made = run_job(job, say)
            except UserError as error:
                failures.append(f"{job.config} on {job.topology}: {error}")
                say(failures[-1])
                continue
            reports += made
            print(*map(table, made), sep="\n", flush=True)
    truths = []
    for truth in PUBLISHED:
        if arguments.only in f"{truth.name} {truth.topology}":
            where = find_slice(truth.topology)
            program = truth.make(make_mesh(truth.mesh, where.devices))
            truths.append((truth, study("published", program, where, say)))
            print(table(truths[-1][1]), flush=True)
    draft = arguments.out.with_suffix(".tmp")
    draft.write_text(page(reports, truths, failures))
    draft.replace(arguments.out)


if __name__ == "__main__":
    main()
