"""Sweeps: the points of one, run one after another, handed to machines, and gathered into one table and page.

A sweep file has one function, ``sweep(add)``, that calls ``add(name, variant, **{"train.steps": 9})`` for
every point, as in big_vision (google-research/big_vision ``configs/*/sweep``).
"""

import contextlib
import csv
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.load import blame
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.locks import locked
from metacanvas_jax.report.charts import SERIES, Chart
from metacanvas_jax.report.page import ReportData, render
from metacanvas_jax.report.sections import Section, Table, listed, tables
from metacanvas_jax.train.metrics import is_number, read_metrics, read_scores

ERROR = "error.txt"
"""File of a run with the error that it ended with, in one line. It is removed when the run goes on."""
CURVES = {"loss": "Training loss", "val_loss": "Validation loss", "score": "Score"}
"""Metrics whose curves the page shows, and their titles."""
LAST = 0.1  # share of a run at its end over which its losses are averaged


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, ``FILE:VARIANT``, and values that differ from that config."""

    name: str
    config: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def overrides(self) -> list[str]:
        """The changes as arguments of `metacanvas train`."""
        return [f"--config.{key}={value}" for key, value in self.changes]


def read(sweep: str | Path, config: str) -> list[Point]:
    """The points of a sweep file over a config. Words of the config's variant, such as ``miniature``, hold for all.

    Like configs, the files that ship are found from any folder.

    Raises UserError for a file that is missing or has no ``sweep``, a point without name, and a name given twice.
    """
    path = Path(sweep) if Path(sweep).exists() else files.ROOT / sweep
    if not path.is_file():
        raise UserError(f"no sweep file {sweep}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _blamed(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "sweep", None)):
        raise UserError(f"{sweep} has no function sweep(add)")
    file, _, words = config.partition(":")
    points: list[Point] = []

    def add(name: str, variant: str = "", **changes: Any) -> None:
        if not isinstance(name, str) or not isinstance(variant, str):
            raise UserError(f"{sweep}: the point {name!r} has the variant {variant!r}, expected two strings")
        if not re.fullmatch(r"[A-Za-z0-9_.=+-]+", name) or name.startswith("."):
            raise UserError(f"{sweep}: the point {name!r} needs a name that can be a folder's")
        if name in {point.name for point in points}:
            raise UserError(f"{sweep}: two points are named {name!r}")
        chosen = ".".join(word for word in (variant, words) if word)
        points.append(Point(name, f"{file}:{chosen}" if chosen else file, tuple(changes.items())))

    with _blamed(path):
        module.sweep(add)
    if not points:
        raise UserError(f"{sweep} adds no point")
    return points


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Turns an error of a sweep file, a program that may raise anything, into one line with its place."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UserError(blame(path, error) or f"{path}: {type(error).__name__}: {first_line(error)}") from error


def train_command(point: Point, workdir: Path, extra: Sequence[str] = ()) -> list[str]:
    """`metacanvas train` of a point; ``extra`` are further arguments."""
    folder = ["--workdir", str(workdir / point.name)]
    return ["metacanvas", "train", "--config", point.config, *folder, *point.overrides, *extra]


def run(points: Sequence[Point], workdir: Path, extra: Sequence[str] = ()) -> None:
    """Trains the points one after another, each in a process of its own; runs that were begun go on.

    ``extra`` are further arguments of `metacanvas train`.

    A point that fails does not stop the others. Raises UserError that names all that failed, with their own errors, or
    when another process runs a sweep in the folder.
    """
    failed = []
    with locked(workdir):
        for number, point in enumerate(points, 1):
            print(f"[{number}/{len(points)}] {point.name}", flush=True)
            arguments = train_command(point, workdir, extra)[1:]
            with files.writing(workdir):
                if files.is_local(workdir):
                    (workdir / point.name).mkdir(parents=True, exist_ok=True)  # where the run leaves its error
            if subprocess.run([sys.executable, "-m", "metacanvas_jax.cli.main", *arguments], check=False).returncode:
                error = read_error(workdir / point.name)
                failed.append(f"{point.name} ({error})" if error else point.name)
    if failed:
        raise UserError(f"{len(failed)} of {len(points)} points failed: {', '.join(failed)}")


def collect(points: Sequence[Point], workdir: Path) -> list[dict[str, Any]]:
    """One row per point: what was changed, how far it came, its last losses, its best and last score, its speed.

    Of a run that ended with an error the row has that error. Points without a run are rows without numbers. Raises
    UserError when no point has any.
    """
    rows = []
    for point in points:
        row: dict[str, Any] = {"name": point.name, "config": point.config, **dict(point.changes)}
        logged = history(workdir / point.name)
        row["steps"] = max((entry["step"] for entry in logged), default=0)
        losses = [entry["loss"] for entry in logged if is_number(entry.get("loss"))]
        if losses:
            row["loss"] = float(np.mean(losses[-max(1, int(LAST * len(losses))) :]))
        for key in ("val_loss", "score", "steps_per_second"):
            values = [entry[key] for entry in logged if is_number(entry.get(key))]
            if values:
                row[key] = float(np.median(values)) if key == "steps_per_second" else values[-1]
        scores = read_scores(workdir / point.name) or {}
        row |= {f"overall_{split}": found["overall"] for split, found in scores.items()}
        if error := read_error(workdir / point.name):
            row["error"] = error
        rows.append(row)
    if not any(row["steps"] or "error" in row for row in rows):
        raise UserError(f"{workdir} holds no run of this sweep; its points are {', '.join(p.name for p in points)}")
    return rows


def read_error(folder: Path) -> str:
    """The error that a run ended with, in one line; empty for one that runs, is done, or was not begun."""
    path = folder / ERROR
    return files.read_text(path).strip() if path.exists() else ""


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of a run, of a step logged twice the later; empty for a run that has none.

    Raises UserError as ``read_metrics`` does.
    """
    if not (folder / "metrics.jsonl").exists():
        return []
    latest: dict[float, dict[str, Any]] = {}
    for row in read_metrics(folder):
        latest[row["step"]] = latest.get(row["step"], {}) | row
    return [latest[step] for step in sorted(latest)]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table with one column for every key of any row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for reading: numbers to four digits."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_shown(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_page(title: str, points: Sequence[Point], rows: Sequence[Mapping[str, Any]], workdir: Path) -> str:
    """The table, the errors, and the curves of all points, at most six to a chart, as one HTML file."""
    columns = [column for column in _columns(rows) if column not in ("config", "error")]
    texts = [[_shown(row.get(column)) for column in columns] for row in rows]
    errors = [(row["name"], row["error"]) for row in rows if row.get("error")]
    parts = [
        Section("points", "Points", tables([Table("", [_head(column) for column in columns], texts)])),
        Section("configs", "Configs", listed([(point.name, point.config) for point in points])),
        Section("errors", "Points that ended with an error", listed(errors)),
    ]
    begun = sum(bool(row["steps"]) for row in rows)
    return render(
        ReportData(
            title=title,
            summary=f"A sweep of metacanvas_jax in {workdir}: {begun} of {len(points)} points have begun.",
            charts=list(_charts({point.name: history(workdir / point.name) for point in points})),
            sections=[part for part in parts if part.body],
        )
    )


def _charts(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Chart]:
    """One chart of every kind for each six points that have logged its values."""
    for key, title in CURVES.items():
        lines = {}
        for name, logged in histories.items():
            points = [(entry["step"], entry[key]) for entry in logged if is_number(entry.get(key))]
            if any(value != 0 for _, value in points):
                lines[name] = ([step for step, _ in points], [value for _, value in points])
        names = list(lines)
        for start in range(0, len(names), SERIES):
            shown = {name: lines[name] for name in names[start : start + SERIES]}
            log = key != "score" and all(value > 0 for _, values in shown.values() for value in values)
            yield Chart(title, "step", "", shown, smooth=key == "loss", log=log)


def write(title: str, points: Sequence[Point], workdir: Path) -> list[Path]:
    """``sweep.csv``, ``sweep.md`` and ``sweep.html`` in the folder of the sweep; raises UserError as ``collect``."""
    rows = collect(points, workdir)
    written = []
    texts = {"csv": as_csv(rows), "md": as_markdown(rows), "html": as_page(title, points, rows, workdir)}
    for kind, text in texts.items():
        path = workdir / f"sweep.{kind}"
        files.write(path, text)
        written.append(path)
    return written


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _head(column: str) -> str:
    """A column's name on the page: of a changed value its key, of a number of the runs words."""
    return column if "." in column else column.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
