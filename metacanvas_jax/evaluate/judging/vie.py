"""Scores of a tree of edits or references by a judge that is asked about every result.

The overall score of a result is the root of semantic consistency times perceptual quality; that of a tree is the mean
over its results. An answer that cannot be read gives no score: it is counted and kept as it was written.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from metacanvas_jax import files
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.evaluate.judging import questions
from metacanvas_jax.evaluate.judging.questions import VERSION, Frames, Question
from metacanvas_jax.evaluate.tree import Entry
from metacanvas_jax.paint import requests
from metacanvas_jax.tasks import TASKS

TOGETHER = 32  # results that are judged before the answers are written down


class Judge(Protocol):
    """What answers questions."""

    @property
    def name(self) -> str:
        """What tells its answers from those of others."""
        ...

    def answers(self, asked: Sequence[Question]) -> list[str]:
        """The raw answers, in the order of the questions."""
        ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """One result: its file, its task and prompt, and the raw answers. Scores are from 0 to 10."""

    file: str
    stamp: str
    task: str
    prompt: str
    answers: Mapping[str, str]

    def scores(self) -> dict[str, float] | None:
        """Semantic consistency "SC", perceptual quality "PQ" and "O"; None where an answer could not be read."""
        both = [questions.read(self.answers[aspect]) for aspect in ("consistency", "quality")]
        if both[0] is None or both[1] is None:
            return None
        consistency, quality = min(both[0]), min(both[1])
        return {"SC": consistency, "PQ": quality, "O": math.sqrt(consistency * quality)}


@dataclasses.dataclass(frozen=True)
class Vie:
    """The results of a tree, and how many of its files are not there."""

    judge: str
    judged: tuple[Judged, ...]
    missing: int = 0

    def means(self) -> dict[str, dict[str, float]]:
        """Task to its mean scores, over the results whose answers could be read."""
        tasks: dict[str, list[dict[str, float]]] = defaultdict(list)
        for one in self.judged:
            if (scores := one.scores()) is not None:
                tasks[one.task].append(scores)
        return {task: {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for task, rows in tasks.items()}

    @property
    def unread(self) -> int:
        """Results without a score, as an answer could not be read."""
        return sum(one.scores() is None for one in self.judged)

    def table(self) -> str:
        """One row per task, and what was left out."""
        lines = [f"judged by {self.judge}, {VERSION}", f"{'task':24}{'SC':>8}{'PQ':>8}{'O':>8}{'of':>8}"]
        for task, means in self.means().items():
            count = sum(one.task == task and one.scores() is not None for one in self.judged)
            lines.append(f"{task:24}" + "".join(f"{means[k]:8.2f}" for k in ("SC", "PQ", "O")) + f"{count:8d}")
        lines.append(f"without a score: {self.unread} whose answers could not be read, {self.missing} that are missing")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Scores, counts and every raw answer as JSON."""
        rows = [dataclasses.asdict(one) | {"scores": one.scores()} for one in self.judged]
        counts = {"judged": len(self.judged), "unread": self.unread, "missing": self.missing}
        tree = {"version": VERSION, "judge": self.judge, "counts": counts, "means": self.means(), "results": rows}
        files.write(path, json.dumps(tree, indent=1) + "\n")


def check(entries: Sequence[Entry]) -> None:
    """Raises UserError for a task whose results are compared with nothing."""
    for entry in entries:
        if TASKS[entry.bucket.task].vae not in ("source", "references"):
            raise UserError(
                f"--judge scores edits and references by what was given; {entry.bucket.task} gives nothing to compare"
            )


def judge_tree(judge: Judge, entries: Sequence[Entry], out: Path, path: Path) -> Vie:
    """Judges the results of a tree, and writes them into ``path`` as they come. What is judged there already stays.

    The result of an entry is the last of its files. Raises UserError as ``check`` does, and for files that cannot be
    decoded.
    """
    check(entries)
    known = _known(path, judge.name)
    there = files.listing(out, deep=True)
    todo = [entry for entry in entries if entry.paths[-1] in there]
    missing, judged = len(entries) - len(todo), []
    for start in range(0, len(todo), TOGETHER):
        some, asked, waiting = todo[start : start + TOGETHER], [], []
        for entry in some:
            file, stamp = entry.paths[-1], files.stamp(out / entry.paths[-1])[1]
            if (before := known.get(file)) is not None and before.stamp == stamp:
                judged.append(before)
                continue
            sample = entry.sample()
            asked += questions.questions(sample, _result(out / file, entry, sample), entry.bucket.fps)
            waiting.append((file, stamp, entry.bucket.task, sample.prompt))
        answers = judge.answers(asked) if asked else []
        for place, row in enumerate(waiting):
            both = dict(zip(("consistency", "quality"), answers[2 * place : 2 * place + 2], strict=True))
            judged.append(Judged(*row, both))
        if waiting and jax.process_index() == 0:
            Vie(judge.name, tuple(judged), missing).save(path)
    found = Vie(judge.name, tuple(judged), missing)
    if jax.process_index() == 0:
        found.save(path)
    return found


def _known(path: Path, judge: str) -> dict[str, Judged]:
    """What the same judge has answered to the same questions before."""
    if not path.exists():
        return {}
    tree = files.read_json(path)
    if (tree.get("version"), tree.get("judge")) != (VERSION, judge):
        raise UserError(f"{path} holds the answers of {tree.get('judge')}, {tree.get('version')}: move it away")
    names = [field.name for field in dataclasses.fields(Judged)]
    return {row["file"]: Judged(**{name: row[name] for name in names}) for row in tree.get("results", [])}


def _result(path: Path, entry: Entry, sample: Sample) -> Frames:
    """A result in the shape that it was drawn in, which is also that of the source."""
    if path.suffix == ".mp4":
        return requests.read_video(path, Clip(entry.bucket.size, None, None))
    return base.resized(requests.read_image(path), sample.target.shape[1:3])[None]
