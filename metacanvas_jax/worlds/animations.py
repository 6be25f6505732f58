"""Animated scenes with exact ground truth: drawings that move along described paths.

Time runs from 0 to 1 over a clip, so that an animation is the same for any number of frames.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds.edits import colours_of, recoloured, the
from metacanvas_jax.worlds.requests import Group
from metacanvas_jax.worlds.scenes import Item, SceneWorld, draw_items, is_held_out, training_scene

MOTIONS = {
    "moving to the right": (1, 0),
    "moving to the left": (-1, 0),
    "moving down": (0, 1),
    "moving up": (0, -1),
    "going around in a circle": None,
    "standing still": (0, 0),
}
"""Words for a path and its direction (x, y); a circle has none."""

_TRIES = 1000
_CHECKED = 17  # moments at which drawings must not touch
CIRCLE = "going around in a circle"
STILL = "standing still"


@dataclasses.dataclass(frozen=True)
class Mover:
    """A drawing and its path: from (x, y) to (to_x, to_y), or clockwise around the middle of the two."""

    object: str
    colour: str
    motion: str
    x: int
    y: int
    to_x: int
    to_y: int

    def at(self, time: float) -> Item:
        """The drawing at a time from 0 to 1."""
        if self.motion == CIRCLE:
            middle_x, middle_y = (self.x + self.to_x) / 2, (self.y + self.to_y) / 2
            turn = 2 * math.pi * time
            x = middle_x + (self.x - middle_x) * math.cos(turn) - (self.y - middle_y) * math.sin(turn)
            y = middle_y + (self.x - middle_x) * math.sin(turn) + (self.y - middle_y) * math.cos(turn)
        else:
            x, y = self.x + (self.to_x - self.x) * time, self.y + (self.to_y - self.y) * time
        return Item(self.object, self.colour, round(x), round(y))


@dataclasses.dataclass(frozen=True)
class Animation:
    """Some movers, and the words for all of it."""

    movers: tuple[Mover, ...]

    @property
    def prompt(self) -> str:
        """ "a red cat moving to the right and a blue car standing still"."""
        return " and ".join(f"{Group(m.object, 1, m.colour).phrase()} {m.motion}" for m in self.movers)

    @property
    def reference_prompt(self) -> str:
        """The prompt where reference pictures show what the drawings look like: without colours."""
        return " and ".join(f"the {m.object} {m.motion}" for m in self.movers)

    @property
    def metadata(self) -> dict[str, Any]:
        """What every frame shows, in GenEval's format, and the motions."""
        include = [{"class": m.object, "count": 1, "color": m.colour, "motion": m.motion} for m in self.movers]
        return {"tag": "animation", "include": include, "prompt": self.prompt}

    def to_json(self) -> str:
        """The animation as one JSON line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Animation":
        """The inverse of `to_json`."""
        return cls(tuple(Mover(**mover) for mover in json.loads(text)["movers"]))

    def items(self, time: float) -> tuple[Item, ...]:
        """The drawings at a time from 0 to 1."""
        return tuple(mover.at(time) for mover in self.movers)


def animation(world: SceneWorld, seed: int, index: int) -> Animation:
    """The animation with this number; it depends on world, seed and number only.

    One or two drawings, at least one of which moves; they never touch. Nothing held out of the training scenes is shown
    at any time. Raises UserError when the world has no room for it.
    """
    rng = np.random.default_rng((seed, index, 2))  # 2: apart from the streams of scenes and edits
    scene = training_scene(world, seed, 0)  # of any trained request: its drawings are replaced
    number = 1 + int(rng.random() < 0.5)
    for attempt in range(_TRIES):
        if attempt == _TRIES // 10:  # a tight world, where two drawings seldom pass each other
            number = 1
        names = rng.permutation(len(world.objects))[:number]
        movers = tuple(_mover(rng, world, world.objects[name]) for name in names)
        if all(mover.motion == STILL for mover in movers):
            continue
        made = Animation(movers)
        moments = [made.items(i / (_CHECKED - 1)) for i in range(_CHECKED)]
        if all(_apart(items, world.cell) for items in moments) and not any(
            is_held_out(world, dataclasses.replace(scene, items=items)) for items in moments
        ):
            return made
    raise UserError("the world has no room for a drawing that moves")


def frames(world: SceneWorld, made: Animation, count: int) -> UInt8[np.ndarray, "t h w 3"]:
    """``count`` pictures evenly over the whole animation."""
    return np.stack([draw_items(world, made.items(i / max(1, count - 1))) for i in range(count)])


def edited(world: SceneWorld, made: Animation, seed: int, index: int) -> tuple[Animation, str]:
    """The same motion with one drawing in another colour or taken away, and the instruction."""
    rng = np.random.default_rng((seed, index, 3))
    if len(made.movers) == 2 and rng.random() < 0.4:
        gone = made.movers[rng.integers(2)]
        rest = tuple(mover for mover in made.movers if mover is not gone)
        return Animation(rest), f"remove {the(gone.at(0.0))}"
    result = recoloured(rng, world, made.items(0.0))
    if result is None:  # an object that is drawn in one colour only
        raise UserError("the world has too few colours for edits")
    items, words = result
    recolour = (dataclasses.replace(mover, colour=item.colour) for mover, item in zip(made.movers, items, strict=True))
    return Animation(tuple(recolour)), words


def references(world: SceneWorld, made: Animation) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    """One picture of every drawing, in the centre."""
    middle = (world.size - world.cell) // 2
    return tuple(draw_items(world, [Item(m.object, m.colour, middle, middle)]) for m in made.movers)


def _mover(rng: np.random.Generator, world: SceneWorld, name: str) -> Mover:
    colours = colours_of(world, name)
    colour = colours[rng.integers(len(colours))]
    motion = list(MOTIONS)[rng.integers(len(MOTIONS))]
    room = world.size - world.cell
    direction = MOTIONS[motion]
    if direction is None:
        radius = int(rng.integers(room // 4, room // 2 + 1))
        x, y = (int(rng.integers(radius, room - radius + 1)) for _ in range(2))
        return Mover(name, colour, motion, x, y - radius, x, y + radius)
    step = world.step  # on the grid of the world, where drawings pass each other more often
    length = step * int(rng.integers(max(1, room // (2 * step)), room // step + 1))
    starts = []
    for sign in direction:
        low, high = (0, room - length) if sign > 0 else (length, room) if sign < 0 else (0, room)
        starts.append(step * int(rng.integers(low // step, high // step + 1)))
    x, y = starts
    return Mover(name, colour, motion, x, y, x + direction[0] * length, y + direction[1] * length)


def _apart(items: tuple[Item, ...], cell: int) -> bool:
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) >= cell for i, a in enumerate(items) for b in items[i + 1 :])
