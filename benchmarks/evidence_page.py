"""docs/results.md: tables, verdicts and plots, all of it from the rows of benchmarks/results."""

from collections.abc import Sequence
from pathlib import Path

import evidence_reading
import numpy as np
from evidence_plan import EXPERIMENTS, SEEDS, VARIANTS, Experiment, Hypothesis
from evidence_rows import Results, Rows, difference, figures, mean_and_error, verdict

INTRODUCTION = """# Results in miniature

The paper's comparisons, in a world of [OpenMoji](https://openmoji.org) scenes of 60 x 60 pixels on two CPU cores
(`configs/evidence.py`). A text encoder (Gemma-2's architecture) and an MLLM (Qwen2.5-VL's) were taught first and are
frozen, as in the paper. DiT (SANA's architecture), canvas and connectors are trained from nothing, each variant for the
same number of steps on the same scenes, with three seeds. 100 prompts per category and split are drawn and judged
exactly. *Held out* are prompts with combinations that no training picture shows. Edits of pictures (FLUX's
architecture, 64 x 64 pixels) and videos (Wan's, five frames) are in `configs/evidence_tasks.py`. Of each of these tasks
200 new samples are drawn and judged.

**What carries over and what does not.** The figures say which way a part of the method points in a small world with
exact judges. They do not say how much it gains at full size. Nothing here was run with published weights.

The hypotheses stood in `benchmarks/evidence_plan.py` before the runs. A difference is the mean over seeds of the paired
difference, with its standard error: that of the three differences, or that of counting right results where this is
larger, as three values may lie close together by chance. *Confirmed* means more than two standard errors above 0,
*opposite* more than two below; all else is *not confirmed*. *Mean of the curve* is the mean of the scores that were
taken during training, of 20 prompts a category; the plots show these. *Equal seconds* compares the two curves where the
faster variant ends. `python benchmarks/evidence.py` makes all of it again.
"""


def page(results: Results) -> str:
    """The whole page."""
    rows, parts = results.rows, [INTRODUCTION, *([text] if (text := evidence_reading.reading(results)) else [])]
    for experiment in EXPERIMENTS:
        parts.append(f"## {experiment.title}\n")
        if not ran(rows, experiment):
            parts.append("Not run yet.\n")
            continue
        parts += [f"![Score over steps](results/{experiment.name}.png)\n", _scores(results, experiment)]
        parts.append(_verdicts(results, experiment.hypotheses))
    if results.analysis:
        parts.append(evidence_reading.why(results.analysis))
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


def ran(rows: Rows, experiment: Experiment) -> list[str]:
    """The variants of an experiment that were run, with any seed."""
    return [name for name in experiment.variants if any((name, seed) in rows for seed in SEEDS)]


def _scores(results: Results, experiment: Experiment) -> str:
    rows, names = results.rows, ran(results.rows, experiment)
    columns = list(figures(next(rows[names[0], seed] for seed in SEEDS if (names[0], seed) in rows)))
    paced = set(names) <= results.paces.keys()
    shown = [column.replace("_", " ") for column in columns] + ["ms a step"] * paced
    lines = [f"| | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for name in names:
        runs = [rows[name, seed] for seed in SEEDS if (name, seed) in rows]
        cells = [mean_and_error([figures(run)[column] for run in runs]) for column in columns]
        cells += [f"{1000 * results.paces[name]:.0f}"] if paced else []
        lines.append(f"| {VARIANTS[name].title} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdicts(results: Results, hypotheses: Sequence[Hypothesis]) -> str:
    lines = ["| claim | figure | difference | seeds | verdict |", "|---|---|---|---|---|"]
    for one in hypotheses:
        mean, error, count = difference(results, one.better, one.worse, one.figure)
        shown = f"{mean:+.3f} ± {error:.3f}" if np.isfinite(error) else "-"
        lines.append(f"| {one.claim} | {one.figure} | {shown} | {count} | {verdict(mean, error)} |")
    return "\n".join(lines) + "\n"


def plot(results: Results, experiment: Experiment, path: Path) -> None:
    """The curves of a figure over steps and, where it was measured, over minutes: means in a band of one error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, names = results.rows, ran(results.rows, experiment)
    units = [("step", dict.fromkeys(names, 1.0))]
    if set(names) <= results.paces.keys():
        units.append(("minutes of training", {name: results.paces[name] / 60 for name in names}))
    figure, sides = pyplot.subplots(1, len(units), figsize=(5.5 * len(units), 4), dpi=120, sharey=True, squeeze=False)
    for name in names:
        curves = [np.asarray(rows[name, seed]["curve"]) for seed in SEEDS if (name, seed) in rows]
        steps, scores = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        mean, error = scores.mean(0), scores.std(0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
        for axes, (_, unit) in zip(sides[0], units, strict=True):
            x = unit[name] * steps
            (line,) = axes.plot(x, mean, marker="o", markersize=3, label=VARIANTS[name].title)
            axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    for axes, (title, _) in zip(sides[0], units, strict=True):
        axes.set_xlabel(title)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    sides[0][0].set_ylabel("right results")
    sides[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def write(docs: Path, results: Results) -> None:
    """The page and its plots below ``docs``; none of it before the first run."""
    if not results.rows:
        return
    (docs / "results").mkdir(exist_ok=True)
    (docs / "results.md").write_text(page(results))
    for experiment in EXPERIMENTS:
        if ran(results.rows, experiment):
            plot(results, experiment, docs / "results" / f"{experiment.name}.png")
