"""The demo: prepare, teach the MLLM, train MetaCanvas, draw held-out prompts, judge them, report.

Every stage continues or skips what an earlier call left behind, so that a killed demo is simply started again.
"""

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config.networks import network
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.data.inputs import prompter
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import scenes
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.launch.training import train
from metacanvas_jax.miniature import exam as understanding
from metacanvas_jax.paint.runs import Trained, load
from metacanvas_jax.report import page as report
from metacanvas_jax.report import pictures
from metacanvas_jax.report.canvas_maps import canvas_maps
from metacanvas_jax.report.charts import Chart
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.trees import parameter_count, partition
from metacanvas_jax.weights import saved

QUESTIONS = 256
SHOWN = 6  # pictures per category and split in the report
BARS = {"single_object": 0.75, "counting": 0.20}
SHEET = "pictures.png"  # the last file of a demo
SEEN_BAR, HELD_OUT_BAR, SHUFFLED_LIMIT = 0.30, 0.25, 0.02


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where the report lies, the scores, and the bars that were missed (none, normally)."""

    report: Path
    scored: scenes.Scored
    missed: tuple[str, ...]


class Clock:
    """Seconds of every stage, kept on disk so that a continued demo reports all of them."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = files.read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage and announces it."""
        print(f"── {name}", flush=True)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.seconds))


def demo(mllm: ConfigDict, painter: ConfigDict, workdir: Path, mllm_workdir: Path) -> Outcome:
    """All stages. ``mllm`` and ``painter`` are configs of the objectives "understand" and "paint" on one world."""
    teaching, painting = experiment(mllm), experiment(painter)
    if teaching.world != painting.world:
        raise UserError("the demo's two configs describe different worlds")
    finished = (workdir / SHEET).exists()
    clock = Clock(workdir / "timings.json")
    if finished:
        clock.seconds.clear()
    with clock.stage("scenes, tokenizer, autoencoder"):
        prepare(painting)
    with clock.stage("teaching the MLLM"):
        train(mllm, mllm_workdir)
    with clock.stage("questions to the MLLM"):
        answered = interview(teaching, mllm_workdir)
    with clock.stage("training MetaCanvas"):
        train(painter, workdir)
    with clock.stage("drawing and judging"):
        trained = load(workdir)
        scored = scenes.evaluate(trained.painter, trained.params, Asked(progress=True))
        scored.save(workdir / "scores.json")
    missed = missed_bars(scored)
    data = report_data(trained, scored, answered, clock.seconds, workdir, mllm_workdir, missed)
    path = report.write_report(workdir / "report.html", data)
    save_sheet(trained.setup, scored, workdir / SHEET)
    return Outcome(path, scored, missed)


def interview(teaching: Experiment, mllm_workdir: Path) -> list[understanding.Answered]:
    """Questions about scenes that were never trained on."""
    params, _ = saved.load(mllm_workdir / "weights")
    examples = UnderstandExamples(prompter(teaching), teaching.world, max(teaching.mllm.buckets))
    return understanding.interview(network(teaching), params, examples, QUESTIONS)


def missed_bars(scored: scenes.Scored) -> tuple[str, ...]:
    """What fell short of what the miniature is known to reach."""
    seen, held_out = (scored.evaluations[split].scores for split in scenes.SPLITS)
    figures = [(name, seen.categories[name], bar) for name, bar in BARS.items()]
    figures += [("seen prompts", seen.pictures, SEEN_BAR), ("held-out prompts", held_out.pictures, HELD_OUT_BAR)]
    missed = [f"{name} {value:.2f} < {bar:.2f}" for name, value, bar in figures if value < bar]
    for split, scores in (("seen", seen), ("held-out", held_out)):
        if scores.shuffled is not None and scores.shuffled > SHUFFLED_LIMIT:
            missed.append(f"shuffled {split} prompts {scores.shuffled:.3f} > {SHUFFLED_LIMIT:.2f}")
    return tuple(missed)


def report_data(
    trained: Trained,
    scored: scenes.Scored,
    answered: list[understanding.Answered],
    seconds: Mapping[str, float],
    workdir: Path,
    mllm_workdir: Path,
    missed: tuple[str, ...],
) -> report.ReportData:
    """Everything on the page."""
    setup = trained.setup
    seen, held_out = (scored.evaluations[split].scores for split in scenes.SPLITS)
    trainable, _ = partition(trained.params, setup.train.rules)
    size = parameter_count(trainable)
    frozen = parameter_count(trained.params) - size
    right = np.mean([one.right for one in answered])
    facts = (
        report.Fact("Seen combinations", report.percent(seen.pictures), f"of {sum(seen.counts.values())} pictures"),
        report.Fact(
            "Held-out combinations", report.percent(held_out.pictures), f"of {sum(held_out.counts.values())} pictures"
        ),
        report.Fact("Trained", f"{size / 1e6:.1f} M", f"parameters, beside {frozen / 1e6:.1f} M frozen"),
        report.Fact("Steps", f"{trained.step}", f"of {setup.train.batch} pictures"),
        report.Fact("Time", report.duration(sum(seconds.values())), "all stages"),
    )
    samples = _samples(setup, scored)
    return report.ReportData(
        title="MetaCanvas in miniature",
        summary=(
            "A tiny MLLM learned to understand scenes of OpenMoji drawings and was frozen; then learnable canvas "
            "tokens, connectors and a small diffusion transformer learned to paint what it plans. A deterministic "
            "judge looks at every picture: objects, colours, counts and places must be right, and nothing else may be "
            "there."
        ),
        facts=facts,
        scores=_score_rows(seen, held_out),
        scores_note="All bars reached." if not missed else "Missed: " + "; ".join(missed) + ".",
        charts=_charts(workdir, mllm_workdir),
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
        bars = {"seen": BARS[name]} if name in BARS else {}
        rows.append(report.ScoreRow(name, shares, counts, bars))
    totals = {"seen": sum(seen.counts.values()), "held-out": sum(held_out.counts.values())}
    shares = {"seen": seen.pictures, "held-out": held_out.pictures}
    rows.append(
        report.ScoreRow("all pictures", shares, totals, {"seen": SEEN_BAR, "held-out": HELD_OUT_BAR}, total=True)
    )
    shuffled = {"seen": seen.shuffled, "held-out": held_out.shuffled}
    limits = {"seen": SHUFFLED_LIMIT, "held-out": SHUFFLED_LIMIT}
    rows.append(report.ScoreRow("shuffled prompts", shuffled, totals, limits=limits))
    return rows


def _charts(workdir: Path, mllm_workdir: Path) -> list[Chart]:
    def line(folder: Path, name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in read_metrics(folder) if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    charts = [
        Chart("Flow loss", "step", "mean squared error", {"MetaCanvas": line(workdir, "loss")}, smooth=True, log=True),
    ]
    score = line(workdir, "score")
    if score[0]:
        charts.append(Chart("Score while training", "step", "right pictures", {"seen": score}, y_range=(0.0, 1.0)))
    charts.append(Chart("MLLM", "step", "words guessed right", {"MLLM": line(mllm_workdir, "accuracy")}, smooth=True))
    return charts
