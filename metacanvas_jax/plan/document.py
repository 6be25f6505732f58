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
    *("config", "program", "slice", "mesh", "samples", "fits", "peak GiB", "expected s per step", "range", "best s"),
    *("expected MFU", "best MFU", "expected MFU without VAE", "FLOPs / written", "canvas: expected seconds", "FLOPs"),
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
    config = job.name if isinstance(job, Job) else job.name.partition(" ")[0]
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
        "[planning.md](planning.md) says what is compiled, what is fitted on measured jobs, and how far off that is.",
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
    lines += [f"\n{report.config} on {report.topology}: {report.note}." for report in reports if report.note]
    if truths:
        lines += [
            "",
            "## Published jobs",
            "",
            "These are programs of this project for jobs that others have measured. Those jobs ran other kernels and",
            "kept other values, so their times are no check of these rows. [planning.md](planning.md) compares plans",
            "of the jobs as they were run.",
            "",
            _row(("job", "published", "expected", "best", "assumptions")),
            "|---" * 5 + "|",
        ]
        for truth, report in truths:
            published_time = f"{truth.seconds:.3f} s ({truth.source})"
            times = [f"{report.expected:.3f} s", f"{report.seconds:.3f} s"] if report.passed else [report.verdict, "-"]
            lines.append(_row((truth.name, published_time, *times, truth.assumptions)))
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
    low, high = report.factors.interval(report.expected)
    cells += [f"{report.expected:.3f}", f"{low:.3f} to {high:.3f}", f"{report.seconds:.3f}"]
    cells += [f"**{report.expected_mfu:.1%}**", f"{report.mfu:.1%}"]
    cells.append(f"{report.without(parts.VAE).expected_mfu:.1%}" if report.runs_vae else "-")
    cells.append(f"{report.flops_ratio:.3f}")
    canvas = any(part.name in parts.CANVAS_PARTS for part in report.parts)
    return cells + ([f"+{report.canvas_share(what):.2%}" for what in ("expected", "flops")] if canvas else ["-", "-"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
