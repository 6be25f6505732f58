"""Scores of every task that a run trains on drawings of its world, by exact judges.

A result is right or wrong, with reasons: an edit has changed what it was to change and nothing else; a video shows the
right drawings in every frame, and they move as the words tell. The samples are those that training does not read.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import held_out
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.types import Params
from metacanvas_jax.worlds.animations import Animation
from metacanvas_jax.worlds.edits import Edit
from metacanvas_jax.worlds.judge import Judge, Verdict
from metacanvas_jax.worlds.judge_edits import edit_verdict, same_verdict
from metacanvas_jax.worlds.judge_videos import LEAST_FRAMES, continued_verdict, edited_verdict, told_verdict
from metacanvas_jax.worlds.scenes import Scene


@dataclasses.dataclass(frozen=True)
class Judged:
    """One result: its sample's name and prompt, the kind of prompt or edit, and the reasons why it is wrong."""

    name: str
    prompt: str
    kind: str
    reasons: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether it is what was asked for."""
        return not self.reasons


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """The results of every task."""

    judged: Mapping[str, tuple[Judged, ...]]

    def metrics(self) -> dict[str, float]:
        """The share of right results of each task, and their mean."""
        shares = {task: _share(results) for task, results in self.judged.items()}
        return {"score": float(np.mean(list(shares.values()))), **{f"score_{task}": x for task, x in shares.items()}}

    def table(self) -> str:
        """One row per task and, below it, one per kind."""
        lines = [f"{'task':34}{'right':>8}{'of':>6}"]
        for task, results in self.judged.items():
            lines.append(f"{task:34}{_share(results):8.3f}{len(results):6d}")
            kinds = _by_kind(results)
            lines += [f"  {kind:32}{_share(group):8.3f}{len(group):6d}" for kind, group in kinds.items()]
        return "\n".join([*lines, f"{'mean of tasks':34}{self.metrics()['score']:8.3f}"])

    def save(self, path: Path) -> None:
        """Scores and every result with its reasons, as JSON."""
        tree = {task: [dataclasses.asdict(one) for one in results] for task, results in self.judged.items()}
        files.write(path, json.dumps({"scores": self.metrics(), "results": tree}, indent=1) + "\n")


def evaluate(painter: Painter, params: Params, asked: Asked) -> TaskScores:
    """Draws and judges held-out samples of every task of the run, during a training only a few.

    Raises UserError for a run on other data than drawings, or that draws them in another size.
    """
    setup = painter.setup
    check(setup)
    judge, judged = Judge(setup.world), {}
    count = setup.eval.during_training if asked.training else setup.eval.samples
    for task, bucket in held_out.of_tasks(setup).items():
        records = held_out.held_out(setup, bucket)
        samples = [records[i] for i in range(min(count, len(records), asked.limit or count))]
        drawn = painter.paint(
            params,
            samples,
            bucket,
            seed=setup.eval.seed if asked.seed is None else asked.seed,
            guidance=asked.guidance,
            canvas=asked.canvas,
            progress=asked.progress,
        )
        judged[task] = tuple(judge_one(judge, *pair) for pair in zip(samples, drawn.pixels, strict=True))
    return TaskScores(judged)


def check(setup: Experiment) -> None:
    """Raises UserError unless a run makes pictures and videos of its world, in their size: the judge knows no others.

    Videos need frames enough to tell their motions apart.
    """
    own = [source for source in setup.sources if source.kind not in DRAWN]
    if own:
        raise UserError(
            f"the evaluator 'tasks' judges drawings of the OpenMoji world; this run was trained on "
            f"{own[0].path or own[0].kind}: flow_loss or a benchmark fits it"
        )
    size = setup.world.size
    for bucket in setup.shapes:
        if bucket.size != (size, size) or 1 < bucket.frames < LEAST_FRAMES:
            rows, columns = bucket.size
            raise UserError(
                f"the evaluator 'tasks' judges drawings of {size} x {size} pixels, and videos of {LEAST_FRAMES} frames "
                f"or more; this run draws {bucket.task} of {bucket.frames} x {rows} x {columns}"
            )
    held_out.check(setup)


def judge_one(judge: Judge, sample: Sample, pixels: np.ndarray) -> Judged:
    """Judges what was drawn ``[t h w 3]`` for a sample of drawings."""
    verdict, kind = JUDGES[sample.task](judge, sample, pixels)
    return Judged(sample.name, sample.prompt, kind, verdict.reasons)


def _picture(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    metadata = json.loads(sample.metadata)
    return judge.verdict(pixels[0], metadata), metadata["tag"]


def _reconstruction(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    scene = Scene.from_json(sample.scene)
    return same_verdict(judge, pixels[0], scene.items), scene.category


def _edit(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    edit = Edit.from_json(sample.scene)
    return edit_verdict(judge, pixels[0], edit), edit.kind


def _told(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    animation = Animation.from_json(sample.scene)
    return told_verdict(judge, pixels, animation), _number(animation)


def _continued(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    animation = Animation.from_json(sample.scene)
    return continued_verdict(judge, pixels, animation, sample.image), _number(animation)


def _edited_video(judge: Judge, sample: Sample, pixels: np.ndarray) -> tuple[Verdict, str]:
    kind = "remove" if sample.prompt.startswith("remove") else "recolour"
    return edited_verdict(judge, pixels, Animation.from_json(sample.scene)), kind


def _number(animation: Animation) -> str:
    return {1: "one drawing", 2: "two drawings"}[len(animation.movers)]


JUDGES: dict[str, Callable[[Judge, Sample, np.ndarray], tuple[Verdict, str]]] = {
    "text_to_image": _picture,
    "reconstruction": _reconstruction,
    "image_editing": _edit,
    "text_to_video": _told,
    "image_to_video": _continued,
    "video_editing": _edited_video,
    "reference_to_video": _told,
}
"""What judges each task, and the kind of what it judged."""


def _share(results: tuple[Judged, ...] | list[Judged]) -> float:
    return float(np.mean([one.right for one in results]))


def _by_kind(results: tuple[Judged, ...]) -> dict[str, list[Judged]]:
    kinds = collections.defaultdict(list)
    for one in results:
        kinds[one.kind].append(one)
    return dict(sorted(kinds.items()))
