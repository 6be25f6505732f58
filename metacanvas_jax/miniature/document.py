"""The report of the demo: what stands on its page."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.evaluate import scenes
from metacanvas_jax.miniature import bars
from metacanvas_jax.miniature import exam as understanding
from metacanvas_jax.paint.runs import Trained
from metacanvas_jax.report import page as report
from metacanvas_jax.report import pictures
from metacanvas_jax.report.canvas_maps import canvas_maps
from metacanvas_jax.report.charts import Chart
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.trees import parameter_count, partition

SHOWN = 6  # pictures per category and split in the report


def report_data(
    trained: Trained,
    scored: scenes.Scored,
    leading: list[report.Sample],
    film: bytes,
    answered: list[understanding.Answered],
    seconds: Mapping[str, float],
    workdir: Path,
    missed: tuple[str, ...],
    *,
    base: Path | None,
    teaching: Path | None,
) -> report.ReportData:
    """Everything on the page.

    ``base`` and ``teaching`` are the runs in which the demo trained its DiT without a canvas, and taught its MLLM; None
    where it did not.
    """
    setup = trained.setup
    seen, held_out = (scored.evaluations[split].scores for split in scenes.SPLITS)
    trainable, _ = partition(trained.params, setup.train.rules)
    size = parameter_count(trainable)
    frozen = parameter_count(trained.params) - size
    before = _last_step(base)
    right = np.mean([one.right for one in answered])
    facts = (
        report.Fact("Seen combinations", report.percent(seen.pictures), f"of {sum(seen.counts.values())} pictures"),
        report.Fact(
            "Held-out combinations", report.percent(held_out.pictures), f"of {sum(held_out.counts.values())} pictures"
        ),
        report.Fact("Trained", f"{size / 1e6:.1f} M", f"parameters, beside {frozen / 1e6:.1f} M frozen"),
        report.Fact("Steps", f"{before + trained.step:,}", _steps(before, trained.step, setup.train.batch)),
        report.Fact("Time", report.duration(sum(seconds.values())), "all stages"),
    )
    samples = _samples(setup, scored)
    without = "" if setup.canvas is None else "; without the canvas, from the same noise"
    return report.ReportData(
        title="MetaCanvas in miniature",
        summary=(
            "A tiny MLLM was taught to understand scenes of OpenMoji drawings and frozen. "
            + ("Under it a small diffusion transformer learned to paint. " if before else "")
            + "Learnable canvas tokens, connectors and "
            + ("this" if before else "a small diffusion")
            + " transformer then learned to paint what the MLLM plans. A deterministic judge looks at every picture: "
            "objects, colours, counts and places must be right, and nothing else may be there."
        ),
        facts=facts,
        film=report.Film(
            film,
            f"{setup.sampler.steps} steps from noise to pictures"
            + (
                "."
                if setup.canvas is None
                else "; to the right of each what the canvas adds to its patches, as colours."
            ),
        ),
        lead=leading,
        lead_note=(
            "New prompts. Picture, with a box around what the judge found (red: no drawing it knows); canvas map"
            f"{without}."
        ),
        scores=_score_rows(seen, held_out),
        scores_note="All bars reached." if not missed else "Missed: " + "; ".join(missed) + ".",
        charts=_charts(workdir, base, teaching),
        pictures=samples,
        pictures_note=f"Guidance {setup.sampler.guidance}, {setup.sampler.steps} steps; the first of each list.",
        canvas=[sample for sample in samples if sample.maps][:: max(1, len(samples) // 12)],
        mllm=report.Understanding(
            understanding.accuracy(answered),
            [report.Answer(a.exchange.question, a.answer, a.exchange.answer, a.image) for a in answered[:16]],
            f"{report.percent(float(right))} of {len(answered)} questions about new scenes answered to the letter.",
        ),
        timings=[(name, value, "") for name, value in seconds.items()],
        config=(workdir / "config.json").read_text(),
        versions={name: importlib.metadata.version(name) for name in ("metacanvas_jax", "jax", "flax", "optax")},
    )


def save_sheet(setup: Experiment, scored: scenes.Scored, path: Path) -> None:
    """The report's pictures as one PNG, framed by the judge's verdict."""
    samples = _samples(setup, scored)
    sheet = pictures.grid(
        [sample.picture for sample in samples],
        [sample.prompt for sample in samples],
        columns=SHOWN,
        right=[sample.right for sample in samples],
    )
    pictures.save_png(sheet, path)


def _samples(setup: Experiment, scored: scenes.Scored) -> list[report.Sample]:
    samples = []
    for split in scenes.SPLITS:
        drawn, evaluation = scored.pictures[split], scored.evaluations[split]
        maps = None if drawn.canvas is None else canvas_maps(drawn.canvas)
        counted: dict[str, int] = {}
        for i, scene in enumerate(scenes.prompts(setup, split)):
            counted[scene.category] = counted.get(scene.category, 0) + 1
            if counted[scene.category] > SHOWN:
                continue
            result = evaluation.results[i]
            samples.append(
                report.Sample(
                    prompt=scene.prompt,
                    picture=drawn.pixels[i, 0],
                    right=result["correct"],
                    held_out=split == "held_out",
                    category=scene.category,
                    note=result["reason"],
                    maps=() if maps is None else tuple(maps[i]),
                )
            )
    return samples


def _score_rows(seen, held_out) -> list[report.ScoreRow]:
    rows = []
    for name in dict.fromkeys([*seen.categories, *held_out.categories]):
        shares = {"seen": seen.categories.get(name), "held-out": held_out.categories.get(name)}
        counts = {"seen": seen.counts.get(name, 0), "held-out": held_out.counts.get(name, 0)}
        wanted = {"seen": bars.CATEGORIES[name]} if name in bars.CATEGORIES else {}
        rows.append(report.ScoreRow(name, shares, counts, wanted))
    totals = {"seen": sum(seen.counts.values()), "held-out": sum(held_out.counts.values())}
    shares = {"seen": seen.pictures, "held-out": held_out.pictures}
    rows.append(
        report.ScoreRow("all pictures", shares, totals, {"seen": bars.SEEN, "held-out": bars.HELD_OUT}, total=True)
    )
    shuffled = {"seen": seen.shuffled, "held-out": held_out.shuffled}
    limits = {"seen": bars.SHUFFLED, "held-out": bars.SHUFFLED}
    rows.append(report.ScoreRow("shuffled prompts", shuffled, totals, limits=limits))
    return rows


def _last_step(folder: Path | None) -> int:
    return 0 if folder is None else max((row["step"] for row in read_metrics(folder)), default=0)


def _steps(before: int, after: int, batch: int) -> str:
    parts = f"{before:,} without and {after:,} with a canvas, " if before else ""
    return f"{parts}of {batch} pictures"


def _charts(workdir: Path, base: Path | None, teaching: Path | None) -> list[Chart]:
    def line(folder: Path, name: str, after: int = 0) -> tuple[list[float], list[float]]:
        rows = [row for row in read_metrics(folder) if row.get(name) is not None]
        return [after + row["step"] for row in rows], [row[name] for row in rows]

    before = _last_step(base)
    losses = {} if base is None else {"without canvas": line(base, "loss")}
    losses["with canvas" if before else "MetaCanvas"] = line(workdir, "loss", before)
    charts = [Chart("Flow loss", "step", "mean squared error", losses, smooth=True, log=True)]
    score = line(workdir, "score", before)
    if score[0]:
        charts.append(Chart("Score while training", "step", "right pictures", {"seen": score}, y_range=(0.0, 1.0)))
    if teaching is not None:
        charts.append(Chart("MLLM", "step", "words guessed right", {"MLLM": line(teaching, "accuracy")}, smooth=True))
    return charts
