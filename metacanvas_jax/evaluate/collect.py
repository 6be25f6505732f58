"""The scores of all trees below a folder in one table, beside the figures of the paper."""

from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks.runner import BENCHMARKS

RECIPE, SCORES = ".recipe.json", ".scores"


def collect(folder: Path) -> str:
    """A Markdown table: benchmark, tree, run, step, whether it had its canvas, and its score.

    The scores are what the official commands wrote; trees that were not scored yet say so. The figures of the paper
    follow. Raises UserError for a folder without trees, and for damaged results.
    """
    recipes = sorted(name for name in files.listing(folder, deep=True) if name.endswith(RECIPE))
    if not recipes:
        raise UserError(f"{folder}: no tree of a benchmark there (NAME{RECIPE} lies beside each)")
    lines, seen = ["| benchmark | tree | run | step | drawn | score |", "|---|---|---|---|---|---|"], []
    for name in recipes:
        about, tree = files.read_json(folder / name), name.removesuffix(RECIPE)
        benchmark = BENCHMARKS.get(about.get("benchmark", ""))
        if benchmark is None:
            raise UserError(f"{folder / name}: the benchmark is {about.get('benchmark')!r}, which is not known here")
        place = folder / f"{tree}{SCORES}"
        score = _said(benchmark.scores(place)) if files.listing(place, deep=True) else "not scored yet"
        drawn = (
            "published backbone" if about.get("base") else "with canvas" if about.get("canvas") else "without canvas"
        )
        row = (benchmark.title, tree, str(about.get("run")), str(about.get("step")), drawn, score)
        lines.append("| " + " | ".join(row) + " |")
        if benchmark not in seen:
            seen.append(benchmark)
    for benchmark in seen:
        for where, value in benchmark.paper.items():
            lines.append(f"| {benchmark.title} | | paper | | {where} | {value:.2f} |")
    return "\n".join(lines) + "\n"


def _said(scores) -> str:
    (name, value), *rest = scores.items()
    more = ", ".join(f"{key} {number:.2f}" for key, number in rest)
    return f"{value:.2f} ({name}{f'; {more}' if more else ''})"
