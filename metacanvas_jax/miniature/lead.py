"""What the report leads with: prompts with a layout, painted with and without the canvas."""

from metacanvas_jax.paint.runs import Trained
from metacanvas_jax.report import page as report
from metacanvas_jax.report import pictures
from metacanvas_jax.report.canvas_maps import canvas_maps
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.scenes import eval_prompts

CATEGORIES = ("group", "position", "place")
EACH = 2  # prompts per category and split
SPLITS = ("held_out", "seen")


def samples(trained: Trained) -> list[report.Sample]:
    """Prompts that were never trained on: judge's boxes, canvas map, and the same noise painted without canvas."""
    setup, judge = trained.setup, Judge(trained.setup.world)
    chosen = [
        (split, scene) for split in SPLITS for scene in eval_prompts(setup.world, split, EACH, CATEGORIES, seed=1)
    ]
    prompts = [scene.prompt for _, scene in chosen]
    drawn = trained.draw(prompts, seed=setup.eval.seed, maps=True)
    bare = None if setup.canvas is None else trained.draw(prompts, seed=setup.eval.seed, canvas=False)
    maps = None if drawn.canvas is None else canvas_maps(drawn.canvas)
    found = []
    for i, (split, scene) in enumerate(chosen):
        verdict = judge.verdict(drawn.pixels[i, 0], scene.metadata)
        boxes = [(one.box, pictures.RIGHT if one.object else pictures.WRONG) for one in verdict.detections]
        found.append(
            report.Sample(
                prompt=scene.prompt,
                picture=pictures.boxed(drawn.pixels[i, 0], boxes),
                right=verdict.correct,
                held_out=split == "held_out",
                category=scene.category,
                maps=() if maps is None else tuple(maps[i]),
                beside=() if bare is None else (("without canvas", bare.pixels[i, 0]),),
            )
        )
    return found
