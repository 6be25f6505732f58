"""The demo: prepare, train a DiT and then MetaCanvas under a taught MLLM, draw held-out prompts, judge them, report.

Every stage continues or skips what an earlier call left behind, so that a killed demo is simply started again.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
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
from metacanvas_jax.miniature import bars, document, lead
from metacanvas_jax.miniature import exam as understanding
from metacanvas_jax.paint.runs import load
from metacanvas_jax.report import page as report
from metacanvas_jax.weights import saved

QUESTIONS = 256
BASE = "base"  # the run, in the folder of the demo, in which the DiT learns before it gets a canvas
FILM = "film.gif"
SHEET = "pictures.png"  # the last file of a demo


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
            files.write(self.path, json.dumps(self.seconds))


def demo(
    teacher: ConfigDict, base: ConfigDict | None, painter: ConfigDict, workdir: Path, *, teach: bool = False
) -> Outcome:
    """All stages. ``teacher`` and the others are configs of the objectives "understand" and "paint" on one world.

    The painter reads its MLLM from ``mllm.weights``. With ``teach`` it is taught first, in the folder above. ``base``
    trains the DiT that the painter starts from (None: the painter's own ``start``, or a new DiT).
    """
    if base is not None:
        painter.start = str(workdir / BASE)
    teaching, painting = experiment(teacher), experiment(painter)
    weights = files.folder(painting.mllm.weights)
    if teaching.world != painting.world:
        raise UserError("the demo's two configs describe different worlds")
    if base is not None and (workdir / "config.json").exists() and not (workdir / BASE).exists():
        raise UserError(f"{workdir} holds a run whose DiT began with its canvas; a new demo needs another --workdir")
    if not teach and not (weights / "params.json").exists():
        raise UserError(f"{weights}: no taught MLLM; expected params.json. `metacanvas demo --teach` teaches one")
    finished = (workdir / SHEET).exists()
    clock = Clock(workdir / "timings.json")
    if finished:
        clock.seconds.clear()
    with clock.stage("scenes, tokenizer, autoencoder"):
        prepare(painting)
    if teach:
        with clock.stage("teaching the MLLM"):
            prepare(teaching)
            train(teacher, weights.parent)
    with clock.stage("questions to the MLLM"):
        answered = interview(teaching, weights)
    if base is not None:
        with clock.stage("training the DiT without a canvas"):
            train(base, workdir / BASE)
    with clock.stage("training MetaCanvas"):
        train(painter, workdir)
    with clock.stage("drawing and judging"):
        trained = load(workdir)
        scored = scenes.evaluate(trained.painter, trained.params, Asked(progress=True))
        scored.save(workdir / "scores.json")
        leading, film = lead.samples(trained), lead.film(trained)
        files.write(workdir / FILM, film)
    missed = missed_bars(scored)
    data = document.report_data(
        trained,
        scored,
        leading,
        film,
        answered,
        clock.seconds,
        workdir,
        missed,
        base=None if base is None else workdir / BASE,
        teaching=weights.parent if teach else None,
    )
    path = report.write_report(workdir / "report.html", data)
    document.save_sheet(trained.setup, scored, workdir / SHEET)
    return Outcome(path, scored, missed)


def interview(teaching: Experiment, weights: Path) -> list[understanding.Answered]:
    """Questions about scenes that were never trained on, to the MLLM in a folder."""
    params, _ = saved.load(weights)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    examples = UnderstandExamples(prompter(teaching), teaching.world, max(teaching.mllm.buckets))
    return understanding.interview(network(teaching), params, examples, QUESTIONS)


def missed_bars(scored: scenes.Scored) -> tuple[str, ...]:
    """What fell short of what the miniature is known to reach."""
    seen, held_out = (scored.evaluations[split].scores for split in scenes.SPLITS)
    figures = [(name, seen.categories[name], bar) for name, bar in bars.CATEGORIES.items()]
    figures += [("seen prompts", seen.pictures, bars.SEEN), ("held-out prompts", held_out.pictures, bars.HELD_OUT)]
    missed = [f"{name} {value:.2f} < {bar:.2f}" for name, value, bar in figures if value < bar]
    for split, scores in (("seen", seen), ("held-out", held_out)):
        if scores.shuffled is not None and scores.shuffled > bars.SHUFFLED:
            missed.append(f"shuffled {split} prompts {scores.shuffled:.3f} > {bars.SHUFFLED:.2f}")
    return tuple(missed)
