"""Writes docs/performance.md from reports that are stored as JSON."""

from collections.abc import Sequence
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.hardware import GIB
from metacanvas_jax.plan import parts
from metacanvas_jax.plan.measured import Measured
from metacanvas_jax.plan.report import ASSUMPTIONS, Report, as_json, table
from metacanvas_jax.plan.shipped import Job

HEADS = (
    *("config", "program", "slice", "mesh", "samples", "fits", "peak GiB", "s per step", "MFU", "MFU without VAE"),
    *("FLOPs / written", "canvas: seconds", "FLOPs"),
)


def keep(folder: Path, name: str, reports: Sequence[Report]) -> None:
    """Writes ``folder/name.json`` atomically."""
    files.write(folder / f"{name}.json", as_json(list(reports)))


def kept(folder: Path, name: str) -> list[Report]:
    """The reports of ``folder/name.json``; an empty list without that file."""
    path = folder / f"{name}.json"
    return [Report.from_dict(tree) for tree in files.read_json(path, list)] if path.exists() else []


def name_of(job: Job | Measured) -> str:
    """The name of the file of a job's reports, such as ``t2i_scratch.v5e_4x4.pixels``."""
    config = Path(job.config).stem if isinstance(job, Job) else job.name.partition(" ")[0]
    pixels = ".pixels" if isinstance(job, Job) and job.on.pixels else ""
    topology = job.on.topology if isinstance(job, Job) else job.topology
    return f"{config}.{topology}{pixels}".replace(":", "_").replace("*", "_slices")


def page(folder: Path, jobs: Sequence[Job], published: Sequence[Measured]) -> str:
    """The page of the reports in a folder, in the order of the jobs."""
    reports = [report for job in jobs for report in kept(folder, name_of(job))]
    truths = [(truth, report) for truth in published for report in kept(folder, name_of(truth))]
    lines = [
        "# Estimated performance on TPU",
        "",
        "`make plan-all` (`benchmarks/plan_all.py`) writes this page. Full-size configs are compiled ahead of time for",
        "their TPU slices, and their cost is estimated from the compiled program. No TPU is used.",
        "`metacanvas plan --config C --topology T` prints the same for one config.",
        "",
        *(f"- {note}." for note in ASSUMPTIONS),
        "",
        "## Configs",
        "",
        _row(HEADS),
        "|---" * len(HEADS) + "|",
        *(_row(_cells(report)) for report in reports),
    ]
    if truths:
        lines += [
            "",
            "## Jobs that others measured",
            "",
            _row(("job", "published", "estimate", "estimate / published", "assumptions")),
            "|---" * 5 + "|",
        ]
        for truth, report in truths:
            published_time = f"{truth.seconds:.3f} s ({truth.source})"
            ratio = f"{report.seconds / truth.seconds:.2f}" if report.passed else "-"
            estimate = f"{report.seconds:.3f} s" if report.passed else report.verdict
            lines.append(_row((truth.name, published_time, estimate, ratio, truth.assumptions)))
        for truth, _ in truths:
            lines += ["", f"*{truth.name}.* {truth.difference}"] if truth.difference else []
    lines += ["", "## In detail"]
    for report in [*reports, *(report for _, report in truths)]:
        name = f"{report.config}: {report.program}, {report.topology}"
        lines += ["", f"<details><summary>{name}</summary>", "", "```", table(report).rstrip(), "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def _cells(report: Report) -> list[str]:
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "-"
    cells = [report.config, report.program, report.topology, mesh, str(report.samples)]
    cells += ["PASS" if report.passed else "FAIL", f"{report.needed / GIB:.1f} of {report.limit / GIB:.1f}"]
    if not report.passed:
        return cells + ["-"] * (len(HEADS) - len(cells))
    cells += [f"{report.seconds:.3f}", f"{report.mfu:.1%}"]
    cells.append(f"{report.without(parts.VAE).mfu:.1%}" if report.runs_vae else "-")
    cells.append(f"{report.flops_ratio:.3f}")
    canvas = any(part.name in parts.CANVAS_PARTS for part in report.parts)
    return cells + ([f"+{report.canvas_share(what):.2%}" for what in ("seconds", "flops")] if canvas else ["-", "-"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
