"""Edits of scenes with exact ground truth, as (source, instruction, target): recolour, add, remove, move, count."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds.requests import NUMBERS, PLACES, Group, in_place, plural
from metacanvas_jax.worlds.scenes import Item, Scene, SceneWorld, is_held_out, is_held_pair, training_scene

KINDS = ("recolour", "add", "remove", "move", "count")
_TRIES = 200
_CORNERS = tuple(place for place in PLACES if " corner" in place or place == "in the centre")


@dataclasses.dataclass(frozen=True)
class Edit:
    """What is done to the drawings of a scene, and the words for it."""

    kind: str
    source: tuple[Item, ...]
    target: tuple[Item, ...]
    instruction: str
    place: str | None = None  # where what is added or moved ends up
    changed: tuple[Item, ...] = ()  # the drawings of the target that the source has not

    @property
    def metadata(self) -> dict[str, Any]:
        """What the target must show, in GenEval's format: every kind of drawing in it, with colour and count."""
        include: list[dict[str, Any]] = []
        counts = collections.Counter((item.object, item.colour) for item in self.target)
        moved = {(item.object, item.colour) for item in self.changed} if self.place else set()
        for (name, colour), count in counts.items():
            clause: dict[str, Any] = {"class": name, "count": count, "color": colour}
            if (name, colour) in moved and count == 1:
                clause["place"] = self.place
            include.append(clause)
        return {"tag": f"edit_{self.kind}", "include": include, "prompt": self.instruction}

    def to_json(self) -> str:
        """The edit as one JSON line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Edit":
        """The inverse of `to_json`."""
        tree = json.loads(text)
        items = {name: tuple(Item(**item) for item in tree[name]) for name in ("source", "target", "changed")}
        return cls(**tree | items)


def edit(world: SceneWorld, seed: int, index: int) -> Edit:
    """The edit with this number; it depends on world, seed and number only. Kinds take turns.

    Held-out combinations are in no source and no target. Raises UserError if the world has no room.
    """
    rng = np.random.default_rng((seed, index, 1))  # 1: apart from the stream that draws scenes
    kind = KINDS[index % len(KINDS)]
    for attempt in range(_TRIES):
        scene = training_scene(world, seed, index * _TRIES + attempt)
        made = _MAKERS[kind](rng, world, scene)
        if made is None or not (_plain(made.source) and _plain(made.target)):
            continue
        if not is_held_out(world, dataclasses.replace(scene, items=made.target)):
            return made
    raise UserError(f"the world has no edit of kind {kind!r}")


def the(item: Item, count: int = 1) -> str:
    """The drawings as an instruction points at them: "the red cat", "the blue cars"."""
    return f"the {Group(item.object, count, item.colour).noun()}"


def free_spots(world: SceneWorld, items: Sequence[Item], place: str | None) -> list[tuple[int, int]]:
    """Where one more drawing overlaps none of these."""
    return [
        (x, y)
        for x, y in world.corners[place]
        if all(max(abs(x - item.x), abs(y - item.y)) >= world.cell for item in items)
    ]


def same(item: Item, other: Item) -> bool:
    """Whether two drawings look the same."""
    return (item.object, item.colour) == (other.object, other.colour)


def colours_of(world: SceneWorld, name: str) -> list[str]:
    """The colours that training pictures show an object in."""
    return [colour for colour in world.colours if not is_held_pair(world, name, colour)]


def recoloured(
    rng: np.random.Generator, world: SceneWorld, items: tuple[Item, ...]
) -> tuple[tuple[Item, ...], str] | None:
    """All drawings that look like one of these in another colour, and the instruction; None where none is free."""
    chosen = items[rng.integers(len(items))]
    group = [item for item in items if same(item, chosen)]
    taken = {item.colour for item in items if item.object == chosen.object}
    colours = [colour for colour in colours_of(world, chosen.object) if colour not in taken]
    if not colours:
        return None
    colour = colours[rng.integers(len(colours))]
    target = tuple(dataclasses.replace(item, colour=colour) if same(item, chosen) else item for item in items)
    words = ("make {} {}", "paint {} {}", "change the colour of {} to {}")[rng.integers(3)]
    return target, words.format(the(chosen, len(group)), colour)


def _recolour(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> Edit | None:
    made = recoloured(rng, world, scene.items)
    return made and _made("recolour", scene, *made)


def _add(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> Edit | None:
    name = world.objects[rng.integers(len(world.objects))]
    colours = colours_of(world, name)
    place = list(PLACES)[rng.integers(len(PLACES))]
    spots = free_spots(world, scene.items, place)
    if not spots or any(item.object == name for item in scene.items):
        return None
    new = Item(name, colours[rng.integers(len(colours))], *spots[rng.integers(len(spots))])
    words = f"add {Group(name, 1, new.colour).phrase()} {place}"
    return _made("add", scene, (*scene.items, new), words, place)


def _remove(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> Edit | None:
    del world
    chosen = scene.items[rng.integers(len(scene.items))]
    rest = tuple(item for item in scene.items if not same(item, chosen))
    if not rest:
        return None
    words = ("remove {}", "take {} away")[rng.integers(2)]
    return _made("remove", scene, rest, words.format(the(chosen, len(scene.items) - len(rest))))


def _move(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> Edit | None:
    chosen = scene.items[rng.integers(len(scene.items))]
    place = _CORNERS[rng.integers(len(_CORNERS))]
    half = world.cell / 2
    others = [item for item in scene.items if item is not chosen]
    spots = free_spots(world, others, place)
    unclear = any(same(item, chosen) for item in others)
    if unclear or not spots or in_place(place, chosen.x + half, chosen.y + half, world.size):
        return None
    x, y = spots[rng.integers(len(spots))]
    moved = dataclasses.replace(chosen, x=x, y=y)
    target = tuple(moved if item is chosen else item for item in scene.items)
    return _made("move", scene, target, f"move {the(chosen)} {place.replace('in ', 'to ', 1)}", place)


def _count(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> Edit | None:
    chosen = scene.items[rng.integers(len(scene.items))]
    group = [item for item in scene.items if same(item, chosen)]
    wanted = int(rng.integers(1, world.max_count + 1))
    if wanted == len(group):
        return None
    items = [item for item in scene.items if item not in group[wanted:]]
    for _ in range(wanted - len(group)):
        spots = free_spots(world, items, None)
        if not spots:
            return None
        x, y = spots[rng.integers(len(spots))]
        items.append(dataclasses.replace(chosen, x=x, y=y))
    names = plural(chosen.object)
    words = (
        f"change the number of {chosen.colour} {names} to {NUMBERS[wanted]}",
        f"show {Group(chosen.object, wanted, chosen.colour).phrase()} instead of {NUMBERS[len(group)]}",
    )
    return _made("count", scene, tuple(items), words[rng.integers(2)])


def _plain(items: Sequence[Item]) -> bool:
    """Whether every object is shown in one colour only, so that GenEval's metadata can say what there is."""
    return len({(item.object, item.colour) for item in items}) == len({item.object for item in items})


def _made(kind: str, scene: Scene, target: tuple[Item, ...], words: str, place: str | None = None) -> Edit:
    changed = tuple(item for item in target if item not in scene.items)
    return Edit(kind, scene.items, target, words, place, changed)


_MAKERS = {"recolour": _recolour, "add": _add, "remove": _remove, "move": _move, "count": _count}
