"""Compositional scenes of OpenMoji drawings with exact ground truth: the world, its split by combination, the drawing.

The six categories and the metadata follow GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import openmoji
from metacanvas_jax.worlds.requests import CATEGORIES, PLACES, RELATIONS, Group, Request, in_place

_TRIES = 1000
_HOLD_OUT = 8  # one combination in this many is held out, and one text in this many reserved


@dataclasses.dataclass(frozen=True)
class SceneWorld:
    """The parameters of a world of scenes. Lengths are in pixels.

    Drawings are aligned to the patch grid unless ``free_placement``. ``mixture`` gives the weight of every category in
    training scenes, ``rewording`` the share of reworded prompts, and ``coloured_counts`` the share of counting prompts
    that name a colour.
    """

    size: int = 60
    patch: int = 12
    cell: int = 24
    sprite: int = 22
    objects: tuple[str, ...] = tuple(openmoji.OBJECTS)[:12]
    colours: tuple[str, ...] = tuple(openmoji.COLOURS)[:6]
    max_count: int = 4
    free_placement: bool = False
    rewording: float = 0.2
    coloured_counts: float = 0.6
    mixture: tuple[tuple[str, float], ...] = (
        ("single_object", 0.08),
        ("two_object", 0.12),
        ("counting", 0.2),
        ("colors", 0.14),
        ("position", 0.16),
        ("color_attr", 0.12),
        ("place", 0.14),
        ("group", 0.04),
    )

    def __post_init__(self) -> None:
        def check(true: bool, message: str) -> None:
            if not true:
                raise UserError(f"scene world: {message}")

        check(self.patch > 0 and self.size % self.patch == 0, f"size {self.size} is no multiple of patch {self.patch}")
        check(
            self.free_placement or self.cell % self.patch == 0,
            f"cell {self.cell} is no multiple of patch {self.patch}",
        )
        check(0 < self.sprite <= self.cell, f"sprite {self.sprite} does not fit cell {self.cell}")
        check(2 * self.cell <= self.size, f"size {self.size} has no room for scenes of cell {self.cell}")
        check(2 <= self.max_count <= 4, f"max_count is {self.max_count}, wanted 2 to 4")
        check(len(set(self.objects)) == len(self.objects) >= 2, f"wanted two or more different objects: {self.objects}")
        check(len(set(self.colours)) == len(self.colours) >= 2, f"wanted two or more different colours: {self.colours}")
        for name, known in (
            *((o, openmoji.OBJECTS) for o in self.objects),
            *((c, openmoji.COLOURS) for c in self.colours),
        ):
            check(name in known, f"{name!r} is unknown; known: {', '.join(known)}")
        for category, weight in self.mixture:
            check(category in CATEGORIES, f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
            check(weight >= 0, f"weight of {category!r} is {weight}")
        check(sum(weight for _, weight in self.mixture) > 0, "the mixture has no weight")
        for place in PLACES:
            check(bool(self.corners[place]), f"no position lies {place!r}")

    @property
    def step(self) -> int:
        """Grid of the positions of drawings."""
        return 1 if self.free_placement else self.patch

    @functools.cached_property
    def corners(self) -> dict[str | None, list[tuple[int, int]]]:
        """(x, y) of every cell, as the pixel of its top left corner, that lies in a place; None is anywhere."""
        grid = range(0, self.size - self.cell + 1, self.step)
        everywhere = [(x, y) for y in grid for x in grid]
        half = self.cell / 2
        inside = {
            place: [(x, y) for x, y in everywhere if in_place(place, x + half, y + half, self.size)] for place in PLACES
        }
        return {None: everywhere, **inside}


@dataclasses.dataclass(frozen=True)
class Item:
    """One drawing; (x, y) is the pixel of its cell's top left corner."""

    object: str
    colour: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """The ground truth of a picture: its request, its prompt, and every drawing in the order of the groups."""

    request: Request
    items: tuple[Item, ...]
    prompt: str

    @property
    def category(self) -> str:
        """The category of the request."""
        return self.request.category

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata of the prompt."""
        return self.request.metadata(self.prompt)

    def to_json(self) -> str:
        """The scene as one JSON line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The inverse of `to_json`."""
        tree = json.loads(text)
        request = tree["request"]
        groups = tuple(Group(**group) for group in request["groups"])
        return cls(
            Request(request["category"], groups, request["relation"]),
            tuple(Item(**item) for item in tree["items"]),
            tree["prompt"],
        )


# ---- The split: by combination. No training picture shows a held-out combination. ----


def is_held_pair(world: SceneWorld, object: str, colour: str) -> bool:
    """Whether no training picture shows this object in this colour (one colour of every object)."""
    return world.objects.index(object) % len(world.colours) == world.colours.index(colour)


def _combinations(request: Request) -> list[str]:
    """The structures in a request, in a form that does not depend on the order of words."""
    names = [group.object for group in request.groups]
    found = [f"{group.count} {group.object}" for group in request.groups if group.count > 1]
    found += [f"{group.object} {group.place}" for group in request.groups if group.place]
    if len(names) == 2:
        found.append(" and ".join(sorted(names)))
    if request.relation:
        found.append(_triple(names[0], request.relation, names[1]))
    return found


def _triple(a: str, relation: str, b: str) -> str:
    if relation in ("left of", "above"):
        return f"{a} {relation} {b}"
    return f"{b} {'left of' if relation == 'right of' else 'above'} {a}"


@functools.lru_cache(maxsize=100_000)
def _one_in_eight(text: str) -> bool:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % _HOLD_OUT == 0


def split_of(world: SceneWorld, request: Request) -> str:
    """Where a request belongs: "train", "seen" (trained combinations, words kept for evaluation) or "held_out".

    Held out are one colour of every object, and one in eight pairs of objects, (object, relation, object) triples,
    (object, place) pairs and (object, count) pairs. Of what remains, one in eight texts is never trained on, in every
    category that has enough of them (all but single objects and colours).
    """
    if any(group.colour and is_held_pair(world, group.object, group.colour) for group in request.groups):
        return "held_out"
    if any(_one_in_eight(f"combination {text}") for text in _combinations(request)):
        return "held_out"
    if request.category in ("single_object", "colors"):
        return "train"
    text = " | ".join(sorted(group.phrase() for group in request.groups) + _combinations(request))
    return "seen" if _one_in_eight(f"text {text}") else "train"


def is_held_out(world: SceneWorld, scene: Scene) -> bool:
    """Whether the scene asks for a held-out combination, or shows a held-out colour or relation unasked."""
    if split_of(world, scene.request) == "held_out":
        return True
    if any(is_held_pair(world, item.object, item.colour) for item in scene.items):
        return True
    return any(
        _one_in_eight(f"combination {_triple(a.object, relation, b.object)}")
        for a, b in itertools.combinations(scene.items, 2)
        for relation in RELATIONS
        if a.object != b.object and is_related(world, a, relation, b)
    )


# ---- Sampling ----


def sample_request(rng: np.random.Generator, world: SceneWorld, category: str) -> Request:
    """Any request of a category, from any split."""
    i, j = rng.integers(len(world.objects)), rng.integers(len(world.objects) - 1)
    first, second = world.objects[i], world.objects[j + (j >= i)]
    red, blue = (world.colours[i] for i in rng.integers(len(world.colours), size=2))
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    if category == "single_object":
        return Request(category, (Group(first),))
    if category == "two_object":
        return Request(category, (Group(first), Group(second)))
    if category == "counting":
        colour = red if rng.random() < world.coloured_counts else None
        return Request(category, (Group(first, int(rng.integers(2, world.max_count + 1)), colour),))
    if category == "colors":
        return Request(category, (Group(first, colour=red),))
    if category == "color_attr":
        return Request(category, (Group(first, colour=red), Group(second, colour=blue)))
    if category == "position":
        return Request(category, (Group(first, colour=red), Group(second, colour=blue)), relation)
    if category == "group":
        counts = (2, 1) if rng.random() < 0.5 else (1, 2)
        return Request(category, (Group(first, counts[0], red), Group(second, counts[1], blue)), relation)
    if category == "place":
        places = [list(PLACES)[i] for i in rng.choice(len(PLACES), 2, replace=False)]
        groups = (Group(first, colour=red, place=places[0]), Group(second, colour=blue, place=places[1]))
        return Request(category, groups[: int(rng.integers(1, 3))])
    raise UserError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")


def _related(relation: str, a: tuple[int, int], b: tuple[int, int], cell: int, slack: int) -> bool:
    """Whether cell a stands in the relation to cell b, clearly apart and about level with it."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along >= cell and abs(across) <= slack


def is_related(world: SceneWorld, a: Item, relation: str, b: Item) -> bool:
    """Whether drawing a clearly stands in the relation to drawing b."""
    return _related(relation, (a.x, a.y), (b.x, b.y), world.cell, world.patch)


def place_request(rng: np.random.Generator, world: SceneWorld, request: Request) -> tuple[Item, ...] | None:
    """Colours and positions for every object of a request; None where the request has no layout in this world."""
    wanted = [group for group in request.groups for _ in range(group.count)]
    owner = [i for i, group in enumerate(request.groups) for _ in range(group.count)]
    for _ in range(_TRIES):
        spots: list[tuple[int, int]] = []
        for group, mine in zip(wanted, owner, strict=True):
            free = [
                spot
                for spot in world.corners[group.place]
                if all(max(abs(spot[0] - x), abs(spot[1] - y)) >= world.cell for x, y in spots)
                and all(
                    request.relation is None
                    or mine == other
                    or _related(request.relation, taken, spot, world.cell, world.patch)
                    for other, taken in zip(owner, spots, strict=False)
                )
            ]
            if not free:
                break
            spots.append(free[rng.integers(len(free))])
        if len(spots) == len(wanted):
            items = []
            for group, (x, y) in zip(wanted, spots, strict=True):
                colours = [c for c in world.colours if not is_held_pair(world, group.object, c)]
                colour = group.colour or colours[rng.integers(len(colours))]
                items.append(Item(group.object, colour, x, y))
            return tuple(items)
    return None


def sample_scene(
    rng: np.random.Generator, world: SceneWorld, category: str | None = None, split: str = "train"
) -> Scene:
    """A scene of one split; without a category, one drawn from the world's mixture."""
    category = category or _category(rng, world)
    for _ in range(_TRIES):
        request = sample_request(rng, world, category)
        if split_of(world, request) != split or not (items := place_request(rng, world, request)):
            continue
        scene = Scene(request, items, request.prompt(plain=rng.random() >= world.rewording))
        if split == "held_out" or not is_held_out(world, scene):
            return scene
    raise UserError(f"the world has no {split!r} scene of category {category!r}")


def sample_words(rng: np.random.Generator, world: SceneWorld, category: str | None = None) -> tuple[Request, str]:
    """A request and its words, held-out combinations among them, but no text of "seen".

    Without a category, one is drawn from the world's mixture.
    """
    category = category or _category(rng, world)
    for _ in range(_TRIES):
        request = sample_request(rng, world, category)
        if split_of(world, request) != "seen":
            return request, request.prompt(plain=rng.random() >= world.rewording)
    raise UserError(f"the world reserves every text of category {category!r}")


def _category(rng: np.random.Generator, world: SceneWorld) -> str:
    weights = np.asarray([weight for _, weight in world.mixture])
    return world.mixture[rng.choice(len(weights), p=weights / weights.sum())][0]


def training_scene(world: SceneWorld, seed: int, index: int) -> Scene:
    """The training scene with this number; it depends on world, seed and number only."""
    return sample_scene(np.random.default_rng((seed, index)), world)


def eval_prompts(
    world: SceneWorld, split: str, per_category: int, categories: tuple[str, ...] = CATEGORIES, seed: int = 0
) -> list[Scene]:
    """Plainly worded prompts, each with one layout that fulfils it, ``per_category`` of every category that has any.

    ``split`` is "seen" (trained combinations, texts never trained where the category has enough) or "held_out" (never
    trained combinations; single objects have none). A category with fewer prompts repeats them.
    """
    if split not in ("seen", "held_out"):
        raise UserError(f"unknown split {split!r}; known: 'seen', 'held_out'")
    scenes: list[Scene] = []
    for category in categories:
        rng = np.random.default_rng([seed, *f"{split} {category}".encode()])
        trained = split == "seen" and category in ("single_object", "colors")
        found: dict[str, Scene] = {}
        for _ in range(200 * per_category):
            request = sample_request(rng, world, category)
            if len(found) == per_category or split_of(world, request) != ("train" if trained else split):
                continue
            prompt = request.prompt()
            if prompt not in found and (items := place_request(rng, world, request)):
                found[prompt] = Scene(request, items, prompt)
        distinct = list(found.values())
        scenes += [distinct[i % len(distinct)] for i in range(per_category if distinct else 0)]
    return scenes


# ---- Drawing ----


def draw(world: SceneWorld, scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a scene."""
    return draw_items(world, scene.items)


def draw_items(world: SceneWorld, items: Iterable[Item]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of some drawings, wherever they lie inside it."""
    sprites = openmoji.sprites(world.objects, world.colours, world.sprite, world.cell)
    canvas = np.ones((world.size, world.size, 3), np.float32)
    for item in items:
        window = canvas[item.y : item.y + world.cell, item.x : item.x + world.cell]
        sprite = sprites[world.objects.index(item.object), world.colours.index(item.colour)]
        np.minimum(window, sprite, out=window)
    return (canvas * 255).round().astype(np.uint8)
