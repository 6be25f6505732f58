"""The report of any run: what it is, its curves, its previews, and pictures with and without the canvas."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.launch import summary
from metacanvas_jax.paint import previews
from metacanvas_jax.paint.runs import Trained
from metacanvas_jax.report import page, sections
from metacanvas_jax.report.canvas_maps import canvas_maps, keyframes, laid_over, shown_at
from metacanvas_jax.report.charts import SERIES, Chart
from metacanvas_jax.report.sections import Section, Sheet, Table
from metacanvas_jax.train.boards import group
from metacanvas_jax.train.metrics import is_number, read_metrics

SHEETS = 4  # previews of a task that are shown, from the first to the last
TITLES = {  # group of a metric's name to the title of its charts; the order is that of the page
    "loss": "Training loss",
    "score": "Score",
    "flow_loss": "Validation loss",
    "speed": "Speed",
    "memory": "Memory",
    "optimizer": "Optimizer",
}


def write(run: Path, trained: Trained | None = None, out: Path | None = None, *, seed: int = 0) -> Path:
    """Writes ``report.html`` into a run's folder, or ``out``; with its networks, draws its first samples anew.

    Raises UserError for a folder without metrics, and when the page cannot be written.
    """
    path = files.folder(out or run / "report.html")
    files.write(path, page.render(data_of(run, [] if trained is None else comparisons(trained, seed))))
    return path


def data_of(run: Path, canvas: Sequence[page.Sample] = ()) -> page.ReportData:
    """Everything on the page."""
    rows, known = read_metrics(run), summary.read(run)
    parts = [
        Section("previews", "Previews", sections.sheets(sheets(run / "previews"))),
        Section("run", "Model, data, devices", sections.tables(tables(known))),
    ]
    config = (run / "config.json").read_text() if (run / "config.json").exists() else ""
    return page.ReportData(
        title=known.name if known else run.name,
        summary=f"A run of metacanvas_jax in {run}.",
        facts=facts(rows, known),
        charts=charts_of(rows),
        canvas=list(canvas),
        canvas_note="Left: the picture. Then its canvas maps, laid over it: principal components of what the canvas "
        "connector adds to the tokens, half-way through sampling. Last: the same noise without the canvas.",
        sections=[one for one in parts if one.body],
        config=config,
        versions={} if known is None else known.versions | {"machine": known.host},
    )


def facts(rows: Sequence[Mapping[str, Any]], known: summary.Summary | None) -> list[page.Fact]:
    """The figures of the headline, as far as they are known."""

    def last(name: str) -> float | None:
        return next((row[name] for row in reversed(rows) if is_number(row.get(name))), None)

    steps = max((row["step"] for row in rows), default=0)
    found = [page.Fact("Steps", f"{steps:,}", f"of {known.steps:,}" if known else "")]
    for name, title, note in (("loss", "Loss", "last logged"), ("score", "Score", "last evaluation")):
        if (value := last(name)) is not None:
            found.append(page.Fact(title, f"{value:.4g}", note))
    rates = [row["samples_per_second"] for row in rows if is_number(row.get("samples_per_second"))]
    if rates:
        devices = known.devices if known else ""
        found.append(page.Fact("Samples per second", f"{np.median(rates):.3g}", devices))
    if (mfu := last("mfu")) is not None:
        found.append(page.Fact("MFU", page.percent(mfu), "of the devices' peak"))
    if known:
        frozen = f"parameters, beside {summary.count(known.frozen)} frozen"
        found.append(page.Fact("Trained", summary.count(known.trained), frozen))
    return found


def charts_of(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart for every metric that changes; metrics that share a group and a unit share charts."""
    skipped = {"step", "finite", "steps_per_second"}
    names = list(dict.fromkeys(name for row in rows for name in row if name not in skipped))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        if any(value != points[0][1] for _, value in points):
            lines[name] = ([step for step, _ in points], [value for _, value in points])
    order = {key: place for place, key in enumerate(TITLES)}
    together: dict[tuple[str, str], list[str]] = {}
    for name in sorted(lines, key=lambda name: order.get(group(name), len(order))):
        key = (group(name), "" if "/" in name else name)
        together.setdefault(key, []).append(name)
    charts = []
    for (kind, single), members in together.items():
        for start in range(0, len(members), SERIES):
            shown = members[start : start + SERIES]
            title = TITLES.get(kind, kind.replace("_", " "))
            title = title if not single or single in ("loss", "score") else single.replace("_", " ")
            positive = all(value > 0 for name in shown for value in lines[name][1])
            values = {name.partition("/")[2] or name: lines[name] for name in shown}
            log = positive and kind in ("loss", "flow_loss")
            charts.append(Chart(title, "step", shown[0].split("/")[0], values, smooth=kind == "loss", log=log))
    return charts


def sheets(folder: Path) -> list[Sheet]:
    """A few previews of every task, evenly from the first to the last."""
    if not folder.exists():
        return []
    by_task: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        by_task.setdefault(path.stem.partition("_")[2], []).append(path)
    found = []
    for task, paths in by_task.items():
        for place in np.unique(np.linspace(0, len(paths) - 1, SHEETS).round().astype(int)):
            path = paths[place]
            step = int(path.stem.partition("_")[0])
            name = f"{task.replace('_', ' ')}, step {step:,}" if task else f"step {step:,}"
            found.append(Sheet(name, np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))))
    return found


def comparisons(trained: Trained, seed: int = 0) -> list[page.Sample]:
    """The first samples of every bucket, drawn with and without the canvas from the same noise."""
    setup, found = trained.setup, []
    if setup.canvas is None:
        return []
    for samples, bucket in previews.shown(trained.painter):
        drawn = trained.paint(samples, bucket, seed=seed, maps=True)
        plain = trained.paint(samples, bucket, seed=seed, canvas=False)
        maps = canvas_maps(drawn.canvas)
        for number, sample in enumerate(samples):
            video, ours = drawn.pixels[number], maps[number]
            chosen = keyframes(len(ours), setup.canvas.keyframes)
            places = [shown_at(latent, len(ours), len(video)) for latent in chosen]
            over = [laid_over(ours[latent], video[place]) for latent, place in zip(chosen, places, strict=True)]
            labels = ["canvas"] if len(over) == 1 else [f"canvas, frame {place + 1}" for place in places]
            found.append(
                page.Sample(
                    sample.prompt,
                    video[places[len(places) // 2]],
                    category=bucket.task,
                    maps=[*over, plain.pixels[number, places[len(places) // 2]]],
                    labels=[*labels, "without canvas"],
                )
            )
    return found


def tables(known: summary.Summary | None) -> list[Table]:
    """Parameters by part, data by bucket, devices."""
    if known is None:
        return []
    parts = [(part, f"{trained:,}", f"{frozen:,}") for part, (trained, frozen) in known.parameters.items()]
    data = [(name, f"{count:,}") for name, count in known.data.items()]
    mesh = [(axis, str(size)) for axis, size in known.mesh.items()]
    return [
        Table("Parameters", ("part", "trained", "frozen"), parts),
        Table("Data", ("bucket", "samples"), data),
        Table(f"Mesh of {known.devices}", ("axis", "devices"), mesh),
    ]
