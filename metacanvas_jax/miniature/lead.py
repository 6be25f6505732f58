"""What the report leads with: a film of the sampling; prompts with a layout, painted with and without the canvas."""

from collections.abc import Sequence

from metacanvas_jax.paint.runs import Trained
from metacanvas_jax.report import page as report
from metacanvas_jax.report import pictures
from metacanvas_jax.report.canvas_maps import canvas_maps, moving
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.scenes import eval_prompts

CATEGORIES = ("group", "position", "place")
EACH = 2  # prompts per category and split
SPLITS = ("held_out", "seen")
FILMED = ("two red cats left of a blue car", "a green tree above a yellow star", "three purple ducks")
FPS, STILL = 5.0, 10  # of the film; how many frames the pictures stand still


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


def film(trained: Trained, prompts: Sequence[str] = FILMED) -> bytes:
    """A GIF of the sampling of prompts, a frame for every second step; beside each picture its canvas map, if any."""
    setup = trained.setup
    drawn = trained.draw(prompts, seed=setup.eval.seed, moments=setup.sampler.steps // 2 + 1)
    films = drawn.pixels if drawn.canvas is None else moving(drawn.pixels, drawn.canvas)
    sheets = [pictures.grid(frames, prompts, columns=len(prompts)) for frames in zip(*films, strict=True)]
    return pictures.gif(sheets[-1:] * STILL + sheets, FPS)  # what does not move shows the first frame
