"""Scores of a run on its world: prompts of scenes, seen in training and held out, and a judge of the pictures."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.evaluate import geneval
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


def evaluate(
    painter: Painter, params: Params, *, training: bool = False, guidance: float | None = None, progress: bool = False
) -> Scored:
    """Draws and judges the evaluation prompts; during ``training`` only a few, all of the seen split."""
    setup, judge, evaluations, drawings = painter.setup, Judge(painter.setup.world), {}, {}
    for split in SPLITS[:1] if training else SPLITS:
        scenes = prompts(setup, split, training=training)
        drawn = painter.draw(
            params,
            [scene.prompt for scene in scenes],
            seed=setup.eval.seed,
            guidance=guidance,
            maps=True,
            progress=progress,
        )
        evaluations[split] = geneval.evaluate(judge, drawn.pixels[:, 0], scenes)
        drawings[split] = drawn
    return Scored(evaluations, drawings)


def prompts(setup: Experiment, split: str, *, training: bool = False) -> list[Scene]:
    """The evaluation prompts of a split, with the scenes that they describe."""
    counts = setup.eval
    count = counts.per_category if split == "seen" else counts.per_category_held_out
    return eval_prompts(setup.world, split, counts.during_training if training else count, JUDGED)
