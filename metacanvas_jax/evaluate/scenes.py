"""Scores of a run on its world: prompts of scenes, seen in training and held out, and a judge of the pictures."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import geneval
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.geneval import Evaluation
from metacanvas_jax.paint.painter import Drawn, Painter
from metacanvas_jax.types import Params
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.requests import JUDGED
from metacanvas_jax.worlds.scenes import Scene, eval_prompts

SPLITS = ("seen", "held_out")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Evaluations and pictures of the splits."""

    evaluations: Mapping[str, Evaluation]
    pictures: Mapping[str, Drawn]

    def table(self) -> str:
        """Scores per category, one column per split."""
        return geneval.table({name: evaluation.scores for name, evaluation in self.evaluations.items()})

    def metrics(self) -> dict[str, float]:
        """The scores of the seen prompts, as training logs them."""
        scores = self.evaluations["seen"].scores
        return {"score": scores.overall, **{f"score_{name}": value for name, value in scores.categories.items()}}

    def save(self, path: Path) -> None:
        """All scores as JSON."""
        tree = {name: evaluation.scores.to_dict() for name, evaluation in self.evaluations.items()}
        files.write(path, json.dumps(tree, indent=1) + "\n")


def evaluate(painter: Painter, params: Params, asked: Asked) -> Scored:
    """Draws and judges the evaluation prompts; during a training only a few, all of the seen split.

    Raises UserError for a run that draws no pictures of its world.
    """
    setup, evaluations, drawings = painter.setup, {}, {}
    check(setup)
    judge = Judge(setup.world)
    for split in SPLITS[:1] if asked.training else SPLITS:
        scenes = prompts(setup, split, training=asked.training)[: asked.limit]
        drawn = painter.draw(
            params,
            [scene.prompt for scene in scenes],
            seed=setup.eval.seed if asked.seed is None else asked.seed,
            guidance=asked.guidance,
            canvas=asked.canvas,
            maps=True,
            progress=asked.progress,
        )
        evaluations[split] = geneval.evaluate(judge, drawn.pixels[:, 0], scenes)
        drawings[split] = drawn
    return Scored(evaluations, drawings)


def check(setup: Experiment) -> None:
    """Raises UserError unless a run draws pictures of its world, in their size: no others are known to the judge."""
    own = [source for source in setup.sources if source.kind not in DRAWN]
    if own:
        raise UserError(
            f"the evaluator 'scenes' judges pictures of the OpenMoji world; this run was trained on {own[0].path}: "
            "flow_loss or a benchmark fits it"
        )
    bucket, size = setup.shapes[0], setup.world.size
    if bucket.frames > 1 or bucket.size != (size, size):
        rows, columns = bucket.size
        raise UserError(
            f"the evaluator 'scenes' judges pictures of {size} x {size} pixels of its world; this run draws "
            f"{bucket.frames} x {rows} x {columns}: flow_loss or a benchmark fits it"
        )


def prompts(setup: Experiment, split: str, *, training: bool = False) -> list[Scene]:
    """The evaluation prompts of a split, with the scenes that they describe."""
    counts = setup.eval
    count = counts.per_category if split == "seen" else counts.per_category_held_out
    return eval_prompts(setup.world, split, counts.during_training if training else count, JUDGED)
