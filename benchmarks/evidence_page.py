"""docs/results.md: tables, verdicts and plots, all of it from the rows of benchmarks/results/evidence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evidence_plan import CURVE, EXPERIMENTS, HELD_OUT, SECONDS, SEEDS, SEEN, VARIANTS, Experiment, Hypothesis

Rows = Mapping[tuple[str, int], dict]
"""The row of a run by variant and seed."""

CERTAIN = 2.0  # standard errors beyond which a difference is called one
INTRODUCTION = """# Results in miniature

The paper's comparisons, in a world of [OpenMoji](https://openmoji.org) scenes of 60 x 60 pixels on two CPU cores
(`configs/evidence.py`). A text encoder (Gemma-2's architecture) and an MLLM (Qwen2.5-VL's) were taught first and are
frozen, as in the paper. DiT (SANA's architecture), canvas and connectors are trained from nothing, each variant for the
same number of steps on the same scenes, with three seeds. 100 prompts per category and split are drawn and judged
exactly. *Held out* are prompts with combinations that no training picture shows.

**What carries over and what does not.** The figures say which way a part of the method points in a small world with
exact judges. They do not say how much it gains at full size. Nothing here was run with published weights.

The hypotheses stood in `benchmarks/evidence_plan.py` before the runs. A difference is the mean over seeds of the paired
difference, with its standard error. *Confirmed* means more than two standard errors above 0, *opposite* more than two
below; all else is *not confirmed*. *Mean of the curve* is the mean of the scores that were taken during training, of 20
prompts a category; the plots show these. *Equal seconds* compares the two curves where the faster variant ends.
`python benchmarks/evidence.py` makes all of it again.
"""


def read(folder: Path) -> Rows:
    """The rows of a folder."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(row["variant"], row["seed"]): row for row in rows}


def figures(row: dict) -> dict[str, float]:
    """The figures of a run that hypotheses speak of, and its score by category of seen prompts."""
    seen, held_out = row["scores"]["seen"], row["scores"]["held_out"]
    curve = [score for _, score in row["curve"]]
    return {SEEN: seen["pictures"], HELD_OUT: held_out["pictures"], CURVE: float(np.mean(curve)), **seen["categories"]}


def pace(rows: Rows, name: str) -> float:
    """Seconds of a step of a variant: the median over its runs."""
    return float(np.median([rows[name, seed]["seconds_per_step"] for seed in SEEDS if (name, seed) in rows]))


def after(row: dict, step: float) -> float:
    """The score of a run's curve after so many steps; 0 before the first."""
    steps, scores = np.asarray([[0, 0.0], *row["curve"]]).T
    return float(np.interp(step, steps, scores))


def difference(rows: Rows, better: str, worse: str, figure: str) -> tuple[float, float, int]:
    """Mean, standard error and number of the differences between two variants, paired by seed."""
    pairs = [[rows.get((name, seed)) for name in (better, worse)] for seed in SEEDS]
    pairs = [(a, b) for a, b in pairs if a and b]
    if figure == SECONDS and pairs:
        a, b = pairs[0]
        limit = min(a["steps"] * pace(rows, better), b["steps"] * pace(rows, worse))
        steps = limit / pace(rows, better), limit / pace(rows, worse)
        values = [after(a, steps[0]) - after(b, steps[1]) for a, b in pairs]
    else:
        values = [figures(a)[figure] - figures(b)[figure] for a, b in pairs]
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)) if values else float("nan"), error, len(values)


def verdict(mean: float, error: float) -> str:
    """What a difference says of a hypothesis."""
    if not np.isfinite(error):
        return "not run"
    if abs(mean) <= CERTAIN * error:
        return "not confirmed"
    return "**confirmed**" if mean > 0 else "**opposite**"


def page(rows: Rows) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for experiment in EXPERIMENTS:
        parts += [f"## {experiment.title}\n", f"![Score over steps](results/{experiment.name}.png)\n"]
        parts += [_scores(rows, experiment), _verdicts(rows, experiment.hypotheses)]
    commits = sorted({row["commit"][:12] for row in rows.values()})
    machines = sorted({row["machine"] for row in rows.values()})
    planned = list(dict.fromkeys(name for one in EXPERIMENTS for name in one.variants))
    missing = [f"{name} {seed}" for name in planned for seed in SEEDS if (name, seed) not in rows]
    parts.append("## Runs\n")
    parts.append(
        f"{len(rows)} of {len(planned) * len(SEEDS)} runs; commits {', '.join(commits)}; {'; '.join(machines)}."
        + (f" Not run: {', '.join(missing)}." if missing else "")
        + " Rows with all scores: `benchmarks/results/evidence`.\n"
    )
    return "\n".join(parts)


def _scores(rows: Rows, experiment: Experiment) -> str:
    names = [name for name in experiment.variants if any((name, seed) in rows for seed in SEEDS)]
    if not names:
        return "No run yet.\n"
    columns = list(figures(next(rows[names[0], seed] for seed in SEEDS if (names[0], seed) in rows)))
    shown = [column.replace("_", " ") for column in columns]
    lines = [f"| | seeds | {' | '.join(shown)} | ms a step |", "|---" * (len(columns) + 3) + "|"]
    for name in names:
        runs = [rows[name, seed] for seed in SEEDS if (name, seed) in rows]
        cells = [_mean([figures(run)[column] for run in runs]) for column in columns]
        speed = np.mean([1000 * run["seconds_per_step"] for run in runs])
        lines.append(f"| {VARIANTS[name].title} | {len(runs)} | {' | '.join(cells)} | {speed:.0f} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def _verdicts(rows: Rows, hypotheses: Sequence[Hypothesis]) -> str:
    lines = ["| claim | figure | difference | seeds | verdict |", "|---|---|---|---|---|"]
    for one in hypotheses:
        mean, error, count = difference(rows, one.better, one.worse, one.figure)
        shown = f"{mean:+.3f} ± {error:.3f}" if np.isfinite(error) else "-"
        lines.append(f"| {one.claim} | {one.figure} | {shown} | {count} | {verdict(mean, error)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Rows, experiment: Experiment, path: Path) -> None:
    """Score of seen prompts over steps and over minutes: the mean of the seeds, in a band of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(11, 4), dpi=120, sharey=True)
    for name in experiment.variants:
        curves = [np.asarray(rows[name, seed]["curve"]) for seed in SEEDS if (name, seed) in rows]
        if not curves:
            continue
        steps, scores = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        mean, error = scores.mean(0), scores.std(0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
        for axes, unit in zip(sides, (1.0, pace(rows, name) / 60), strict=True):
            (line,) = axes.plot(unit * steps, mean, marker="o", markersize=3, label=VARIANTS[name].title)
            axes.fill_between(unit * steps, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    for axes, unit in zip(sides, ("step", "minutes of training"), strict=True):
        axes.set_xlabel(unit)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    sides[0].set_ylabel("right pictures of seen prompts")
    sides[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def write(docs: Path, rows: Rows) -> None:
    """The page and its plots below ``docs``; none of it before the first run."""
    if not rows:
        return
    (docs / "results").mkdir(exist_ok=True)
    (docs / "results.md").write_text(page(rows))
    for experiment in EXPERIMENTS:
        plot(rows, experiment, docs / "results" / f"{experiment.name}.png")
