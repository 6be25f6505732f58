"""GenEval-style scores of pictures: per category, overall, and a control with shuffled prompts.

Results have the format of GenEval's evaluate_images.py, so that its summary script reads them.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax import files
from metacanvas_jax.report.pictures import save_png
from metacanvas_jax.worlds.judge import Judge, Verdict, check
from metacanvas_jax.worlds.requests import CATEGORIES
from metacanvas_jax.worlds.scenes import Scene


@dataclasses.dataclass(frozen=True)
class Scores:
    """Fractions of right pictures.

    ``overall`` is the mean over categories (as in GenEval), ``pictures`` the fraction of all pictures, ``shuffled`` the
    fraction that fulfil a prompt drawn for another picture (None where no prompt could be exchanged).
    """

    categories: dict[str, float]
    counts: dict[str, int]
    overall: float
    pictures: float
    shuffled: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and metrics."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores, and GenEval's result line of every picture."""

    scores: Scores
    results: tuple[dict[str, Any], ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each picture is right."""
        return tuple(result["correct"] for result in self.results)


def evaluate(
    judge: Judge, images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene], seed: int = 0
) -> Evaluation:
    """Judge one picture per scene's prompt. Raises ValueError when their numbers differ or there are none."""
    if len(images) != len(scenes) or not scenes:
        raise ValueError(f"wanted one picture for each of {len(scenes)} prompts, got {len(images)}")
    verdicts = judge.verdicts(images, [scene.metadata for scene in scenes])
    results = tuple(_result(i, scene, verdict) for i, (scene, verdict) in enumerate(zip(scenes, verdicts, strict=True)))
    by_category = collections.defaultdict(list)
    for result in results:
        by_category[result["tag"]].append(result["correct"])
    categories = {name: float(np.mean(by_category[name])) for name in CATEGORIES if name in by_category}
    scores = Scores(
        categories=categories,
        counts={name: len(by_category[name]) for name in categories},
        overall=float(np.mean(list(categories.values()))),
        pictures=float(np.mean([result["correct"] for result in results])),
        shuffled=shuffled_control(judge, verdicts, scenes, seed),
    )
    return Evaluation(scores, results)


def shuffled_control(judge: Judge, verdicts: Sequence[Verdict], scenes: Sequence[Scene], seed: int = 0) -> float | None:
    """The fraction of pictures that fulfil the prompt of another scene, one which their own scene does not fulfil."""
    rng = np.random.default_rng(seed)
    passed = []
    for i, verdict in enumerate(verdicts):
        truth = judge.truth(scenes[i])
        for j in rng.permutation(len(scenes)):
            metadata = scenes[j].metadata
            if check(truth, metadata, judge.world.size, judge.strict):
                passed.append(not check(verdict.detections, metadata, judge.world.size, judge.strict))
                break
    return float(np.mean(passed)) if passed else None


def table(columns: Mapping[str, Scores]) -> str:
    """Scores side by side, one column per split."""
    names = [name for name in CATEGORIES if any(name in scores.categories for scores in columns.values())]
    width = max(9, *map(len, columns)) + 2
    lines = ["".join(["category".ljust(15), *(name.rjust(width) for name in columns)])]
    for name in names:
        lines.append(_row(name, [scores.categories.get(name) for scores in columns.values()], width))
    for name in ("overall", "pictures", "shuffled"):
        lines.append(_row(name, [getattr(scores, name) for scores in columns.values()], width))
    return "\n".join(lines)


def write_results(folder: str | os.PathLike, images: Sequence[np.ndarray], evaluation: Evaluation) -> None:
    """Pictures in GenEval's folder layout, with ``results.jsonl`` and ``scores.json`` beside them, in a bucket too."""
    folder = files.folder(folder)
    for image, result in zip(images, evaluation.results, strict=True):
        path = folder / result["filename"]
        pixels = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
        save_png(pixels, path)
        files.write(path.parent.parent / "metadata.jsonl", result["metadata"] + "\n")
    files.write(folder / "results.jsonl", "".join(json.dumps(result) + "\n" for result in evaluation.results))
    files.write(folder / "scores.json", json.dumps(evaluation.scores.to_dict(), indent=1) + "\n")


def _result(index: int, scene: Scene, verdict: Verdict) -> dict[str, Any]:
    boxes = collections.defaultdict(list)
    for detection in verdict.detections:
        boxes[detection.object or "unknown"].append([*detection.box, 1 - min(detection.error, 1.0)])
    return {
        "filename": f"{index:05d}/samples/0000.png",
        "tag": scene.category,
        "prompt": scene.prompt,
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(scene.metadata),
        "details": json.dumps(boxes),
    }


def _row(name: str, values: Sequence[float | None], width: int) -> str:
    return "".join([name.ljust(15), *(("-" if value is None else f"{value:.3f}").rjust(width) for value in values)])
