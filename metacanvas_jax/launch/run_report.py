"""The report of any run: what it is, its curves, its previews, and pictures with and without the canvas."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.launch import summary
from metacanvas_jax.launch.run_charts import charts_of
from metacanvas_jax.paint import previews
from metacanvas_jax.paint.runs import Trained
from metacanvas_jax.report import page, sections
from metacanvas_jax.report.canvas_maps import canvas_maps, keyframes, laid_over, shown_at
from metacanvas_jax.report.sections import Section, Sheet, Table
from metacanvas_jax.train.metrics import is_number, read_metrics

SHEETS = 4  # previews of a task that are shown, from the first to the last


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
    if (loss := last("loss")) is not None:
        found.append(page.Fact("Training loss", f"{loss:.4g}", "last logged"))
    bare = last("val_loss_no_canvas")
    if (loss := last("val_loss")) is not None:
        found.append(page.Fact("Validation loss", f"{loss:.4g}", f"{bare:.4g} without canvas" if bare else "last"))
    elif (score := last("score")) is not None:
        found.append(page.Fact("Score", f"{score:.4g}", "last evaluation"))
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
    data = [(name, f"{count:,}", f"{known.held_out.get(name, 0):,}") for name, count in known.data.items()]
    mesh = [(axis, str(size)) for axis, size in known.mesh.items()]
    return [
        Table("Parameters", ("part", "trained", "frozen"), parts),
        Table("Data", ("bucket", "to train on", "for validation"), data, "\n".join(known.notes.values())),
        Table(f"Mesh of {known.devices}", ("axis", "devices"), mesh),
    ]
