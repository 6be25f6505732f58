"""The curves of a run, from the records of its ``metrics.jsonl``: which of them share a chart, and their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from metacanvas_jax.report.charts import SERIES, Chart, Line
from metacanvas_jax.train.boards import group
from metacanvas_jax.train.metrics import is_number

GROUPS = {  # group of a metric's name to the title of its charts; the order is that of the page
    "loss": "Training loss",
    "flow_loss": "Validation loss",
    "score": "Score",
    "speed": "Speed",
    "memory": "Memory",
    "optimizer": "Optimizer",
}
NAMES = {
    "samples_per_second": "Samples per second",
    "data_wait": "Share of the time that waits for data",
    "mfu": "MFU: share of the devices' peak",
    "grad_norm": "Norm of the gradient",
    "param_norm": "Norm of the parameters",
    "memory_gib": "Memory of a device, GiB",
    "compile_seconds": "Seconds of compilation",
}
HIDDEN = ("step", "finite", "steps_per_second")
VALIDATION = {"val_loss": "with canvas", "val_loss_no_canvas": "without canvas"}


def charts_of(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart for every metric that changes; metrics that share a group and a unit share charts."""
    lines = curves(rows)
    order = {key: place for place, key in enumerate(GROUPS)}
    together: dict[tuple[str, str], dict[str, Line]] = {}
    for name in sorted(lines, key=lambda name: order.get(_kind(name), len(order))):
        shown = VALIDATION.get(name) or name.partition("/")[2] or name.removeprefix("val_loss_")
        together.setdefault((_kind(name), _title(name)), {})[shown] = lines[name]
    charts = []
    for (kind, title), members in together.items():
        names = list(members)
        for start in range(0, len(names), SERIES):
            shown = {name: members[name] for name in names[start : start + SERIES]}
            positive = all(value > 0 for _, values in shown.values() for value in values)
            log = positive and kind in ("loss", "flow_loss")
            charts.append(Chart(title, "step", "", shown, smooth=kind == "loss", log=log))
    return charts


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Steps and values of every metric that changes, without one that repeats another (the only task, a score that is
    the negative of the validation loss).
    """
    lines: dict[str, Line] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in HIDDEN):
        points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        if any(value != points[0][1] for _, value in points):
            lines[name] = ([step for step, _ in points], [value for _, value in points])
    if (loss := lines.get("val_loss")) is not None:
        negative = (loss[0], [-value for value in loss[1]])
        for name in [name for name, line in lines.items() if name != "val_loss" and line in (loss, negative)]:
            del lines[name]
    return lines


def _kind(name: str) -> str:
    return "flow_loss" if name.startswith("val_loss") else group(name)


def _title(name: str) -> str:
    """Metrics of one kind and title share a chart."""
    if name.startswith("val_loss"):
        return "Validation loss" if name in VALIDATION else "Validation loss by task"
    if "/" in name or name in ("loss", "score"):
        kind = group(name)
        return GROUPS.get(kind, kind.replace("_", " ").capitalize())
    return NAMES.get(name, name.replace("_", " ").capitalize())
