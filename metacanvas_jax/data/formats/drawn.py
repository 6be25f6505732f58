"""Drawn samples of every task: OpenMoji scenes, their edits and animations, with exact ground truth."""

import json
from collections.abc import Callable

import numpy as np

from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.transforms import fit_frames
from metacanvas_jax.worlds import animations, edits, openmoji
from metacanvas_jax.worlds.scenes import SceneWorld, draw, draw_items, training_scene

FRAMES, FPS = 9, 8.0  # of animations, where the clip does not say


class Drawn(Guarded):
    """``count`` samples of a world, drawn when they are read: a function of world, seed and number alone.

    ``kind`` is "scenes", "edits" or "animations". Raises UserError when the packages of the [miniature] extra are
    missing.
    """

    def __init__(
        self,
        kind: str,
        world: SceneWorld,
        count: int,
        seed: int,
        layout: Layout,
        max_skips: int = 0,
        in_memory: bool = False,
    ) -> None:
        super().__init__(max_skips, in_memory)
        self.kind, self.world, self.count, self.seed, self.layout = kind, world, count, seed, layout
        openmoji.sprites(world.objects, world.colours, world.sprite, world.cell)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Drawn({self.kind!r})"

    def name(self, index: int) -> str:
        """Kind, seed and number."""
        return f"{self.kind} {self.seed}/{index}"

    def read(self, index: int) -> Sample:
        """The sample with this number."""
        return _KINDS[self.kind](self, index)

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        return fit_frames(pixels if pixels.ndim == 4 else pixels[None], self.layout.clip.size)


def _scene(drawn: Drawn, index: int) -> Sample:
    scene = training_scene(drawn.world, drawn.seed, index)
    return Sample(
        scene.prompt,
        drawn._fit(draw(drawn.world, scene)),
        drawn.layout.task or "text_to_image",
        name=drawn.name(index),
        metadata=json.dumps(scene.metadata),
        scene=scene.to_json(),
    )


def _edit(drawn: Drawn, index: int) -> Sample:
    made = edits.edit(drawn.world, drawn.seed, index)
    return Sample(
        made.instruction,
        drawn._fit(draw_items(drawn.world, made.target)),
        "image_editing",
        source=drawn._fit(draw_items(drawn.world, made.source)),
        name=drawn.name(index),
        metadata=json.dumps(made.metadata),
        scene=made.to_json(),
    )


def _animation(drawn: Drawn, index: int) -> Sample:
    world, clip, task = drawn.world, drawn.layout.clip, drawn.layout.task or "text_to_video"
    count, fps = clip.frames or FRAMES, clip.fps or FPS
    made = animations.animation(world, drawn.seed, index)
    prompt, source, references = made.prompt, None, ()
    if task == "video_editing":
        source = drawn._fit(animations.frames(world, made, count))
        made, prompt = animations.edited(world, made, drawn.seed, index)
    elif task == "reference_to_video":
        prompt = made.reference_prompt
        references = tuple(drawn._fit(picture)[0] for picture in animations.references(world, made))
    return Sample(
        prompt,
        drawn._fit(animations.frames(world, made, count)),
        task,
        source,
        references,
        fps,
        name=drawn.name(index),
        metadata=json.dumps(made.metadata),
        scene=made.to_json(),
    )


_KINDS: dict[str, Callable[[Drawn, int], Sample]] = {"scenes": _scene, "edits": _edit, "animations": _animation}
