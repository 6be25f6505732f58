"""The section of docs/results.md that says why: faults of pictures, and what a canvas tells."""

from collections.abc import Mapping

import numpy as np
from evidence_plan import VARIANTS

ANALYSIS = """## Why

![Pictures and canvas maps](results/maps.png)

Right pictures (above) and wrong ones of one run with text and canvas, with the prompt and the judge's first reason.
Below each is its canvas map, laid over it. Where two places have the same colour, the canvas says the same.
"""


def analysis(found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Tables of what benchmarks/evidence_analysis.py found, mean and standard error over seeds."""
    parts = [ANALYSIS]
    if faults := found.get("faults"):
        kinds = list(next(iter(next(iter(faults.values())).values())))
        lines = [f"| pictures in which there is | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        for name, seeds in faults.items():
            cells = [_shown([one[kind] for one in seeds.values()]) for kind in kinds]
            lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    if probe := found.get("probe"):
        lines = ["| what the canvas adds to a patch tells how likely the first group lies there | R² |", "|---|---|"]
        lines += [f"| {VARIANTS[name].title} | {_shown(list(seeds.values()))} |" for name, seeds in probe.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _shown(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"
