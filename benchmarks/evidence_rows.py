"""The rows of the comparisons, and the differences between variants."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evidence_plan import CURVE, FRAMES, HELD_OUT, RIGHT, SECONDS, SEEDS, SEEN

Rows = Mapping[tuple[str, int], dict]
"""The row of a run by variant and seed."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What was run: the rows, the seconds of a step on a quiet machine by variant, and what the analysis found.

    ``longer`` are scores of one seed after twice as many steps, by variant.
    """

    rows: Rows
    paces: Mapping[str, float] = dataclasses.field(default_factory=dict)
    analysis: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)
    longer: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)


DURING_TRAINING, OF_A_TASK = 140, 50  # prompts of a score that is taken during a training; samples of each task
CERTAIN = 2.0  # standard errors beyond which a difference is called one


def read(folder: Path) -> Results:
    """The files of benchmarks/results."""
    rows = [json.loads(path.read_text()) for path in sorted((folder / "evidence").glob("*.json"))]
    pace, analysis, longer = (
        json.loads(path.read_text()) if (path := folder / f"evidence_{name}.json").exists() else {}
        for name in ("pace", "analysis", "longer")
    )
    paces = {name: float(np.median(seconds)) for name, seconds in pace.get("seconds", {}).items()}
    return Results({(row["variant"], row["seed"]): row for row in rows}, paces, analysis, longer.get("scores", {}))


def figures(row: dict) -> dict[str, float]:
    """The figures of a run that hypotheses speak of; its score by category of seen prompts, or by task and kind."""
    curve = float(np.mean([score for _, score in row["curve"]]))
    if "tasks" in row["scores"]:
        tasks, kinds = row["scores"]["tasks"], row["scores"]["kinds"]
        named = {task.replace("_", " "): share for task, share in tasks.items()} if len(tasks) > 1 else {}
        frames = {f"{task.replace('_', ' ')}{FRAMES}": share for task, share in row["scores"].get("frames", {}).items()}
        return {RIGHT: float(np.mean(list(tasks.values()))), CURVE: curve, **named, **frames, **kinds}
    seen, held_out = row["scores"]["seen"], row["scores"]["held_out"]
    return {SEEN: seen["pictures"], HELD_OUT: held_out["pictures"], CURVE: curve, **seen["categories"]}


def after(row: dict, step: float) -> float:
    """The score of a run's curve after so many steps; 0 before the first."""
    steps, scores = np.asarray([[0, 0.0], *row["curve"]]).T
    return float(np.interp(step, steps, scores))


def judged(row: dict, figure: str) -> int:
    """How many results a figure of a run counts; 0 where the row does not say."""
    scores = row["scores"]
    during = OF_A_TASK * len(scores["tasks"]) if "tasks" in scores else DURING_TRAINING
    if figure in (SECONDS, CURVE):
        return during * (len(row["curve"]) if figure == CURVE else 1)
    if "tasks" in scores:
        counts = {task.replace("_", " "): count for task, count in scores["counts"].items()}
        # The frames of a video are right or wrong together: they count as one.
        return counts.get(figure.removesuffix(FRAMES), sum(counts.values()) if figure == RIGHT else 0)
    counts = scores["held_out" if figure == HELD_OUT else "seen"].get("counts", {})
    return counts.get(figure, sum(counts.values()) if figure in (SEEN, HELD_OUT) else 0)


def difference(results: Results, better: str, worse: str, figure: str) -> tuple[float, float, int]:
    """Mean, standard error and number of the differences between two variants, paired by seed.

    Three seeds may lie close together by chance. The error is therefore at least that of counting right results.
    """
    pairs = [[results.rows.get((name, seed)) for name in (better, worse)] for seed in SEEDS]
    pairs = [(a, b) for a, b in pairs if a and b]
    paces = results.paces
    if figure == SECONDS:
        pairs = pairs if {better, worse} <= paces.keys() else []
        limits = [min(a["steps"] * paces[better], b["steps"] * paces[worse]) for a, b in pairs]
        values = [
            (after(a, limit / paces[better]), after(b, limit / paces[worse]))
            for (a, b), limit in zip(pairs, limits, strict=True)
        ]
    else:
        values = [(figures(a)[figure], figures(b)[figure]) for a, b in pairs]
    if len(values) < 2:
        return values[0][0] - values[0][1] if values else float("nan"), float("nan"), len(values)
    x = np.asarray(values)
    spread = float(np.std(x[:, 0] - x[:, 1], ddof=1) / np.sqrt(len(x)))
    counts = [judged(row, figure) for pair in pairs for row in pair]
    counting = np.sqrt(np.sum(x * (1 - x) / np.reshape(counts, x.shape))) / len(x) if all(counts) else 0.0
    return float(np.mean(x[:, 0] - x[:, 1])), max(spread, float(counting)), len(x)


def verdict(mean: float, error: float) -> str:
    """What a difference says of a hypothesis."""
    if not np.isfinite(error):
        return "not run"
    if abs(mean) <= CERTAIN * error:
        return "not confirmed"
    return "**confirmed**" if mean > 0 else "**opposite**"


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and standard error of some runs; of one run its value."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"
