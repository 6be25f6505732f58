"""Captions and questions about a picture or a prompt, with which a small MLLM is trained before it is frozen.

Questions about a prompt alone (counts, colours, relations, what to draw) make the hidden states of its text carry the
information that the DiT needs. Cells of the patch grid are named by capital letters in reading order; a drawing lies at
the cell of its top left corner.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metacanvas_jax.worlds.facts import OPPOSITE, PLACE_AT
from metacanvas_jax.worlds.requests import NUMBERS, PLACES, RELATIONS, Group, Request, plural, third
from metacanvas_jax.worlds.scenes import Item, Scene, SceneWorld, is_held_pair, is_related, sample_scene

_SIDE = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
NOTHING = "nothing"  # what an empty cell shows


class Exchange(NamedTuple):
    """A question and its only right answer."""

    question: str
    answer: str


def follow_up(question: str) -> str:
    """The question without its prompt, for a conversation in which the prompt was given before."""
    return question.split(" . ")[-1]


def caption(scene: Scene) -> str:
    """The prompt of the picture."""
    return scene.prompt


def cell_name(number: int) -> str:
    """The name of a cell by its number in reading order: A to Z, then AA, AB, ..."""
    letters = chr(ord("A") + number % 26)
    return letters if number < 26 else cell_name(number // 26 - 1) + letters


def cell_names(world: SceneWorld) -> list[str]:
    """The names of all cells of the patch grid in reading order."""
    return [cell_name(number) for number in range((world.size // world.patch) ** 2)]


def layout_caption(scene: Scene, world: SceneWorld) -> str:
    """Every drawing with its cell, in reading order."""
    columns = world.size // world.patch
    items = sorted(scene.items, key=lambda item: (item.y, item.x))
    cells = [round(item.y / world.patch) * columns + round(item.x / world.patch) for item in items]
    return ", ".join(f"{_noun(item)} {cell_name(cell)}" for item, cell in zip(items, cells, strict=True))


def shown(world: SceneWorld, items: Sequence[Item]) -> list[str]:
    """The drawing of which each cell shows a part, in reading order."""
    columns, side = world.size // world.patch, world.cell // world.patch
    cells = [NOTHING] * columns**2
    for item in items:
        row, column = round(item.y / world.patch), round(item.x / world.patch)
        for part in range(side**2):
            cells[(row + part // side) * columns + column + part % side] = _noun(item)
    return cells


def things_to_draw(request: Request) -> str:
    """The numbered list of things to draw, with colour and side where the prompt gives them."""
    sides = ["", ""]
    if request.relation:
        sides = [_SIDE[request.relation], _SIDE[OPPOSITE[request.relation]]]
    things = []
    for group, side in zip(request.groups, sides, strict=False):
        one = f"{group.colour or 'any'} {group.object} {group.place or side}".strip()
        things += [one] * group.count
    return ", ".join(f"{i} {thing}" for i, thing in enumerate(things, 1))


def picture_exchanges(rng: np.random.Generator, world: SceneWorld, scene: Scene) -> list[Exchange]:
    """Every kind of question that the picture answers, once each."""
    items = scene.items
    item = items[rng.integers(len(items))]
    other = world.objects[rng.integers(len(world.objects))]
    names = [each.object for each in items]
    asked = item.object if rng.random() < 0.7 else other
    exchanges = [
        Exchange("what is in the picture ?", layout_caption(scene, world)),
        Exchange("how many things are there ?", NUMBERS[len(items)]),
        Exchange(f"how many {plural(asked)} are there ?", NUMBERS[names.count(asked)]),
    ]
    cells = shown(world, items)
    filled = [number for number, cell in enumerate(cells) if cell != NOTHING]
    number = filled[rng.integers(len(filled))] if rng.random() < 0.7 else int(rng.integers(len(cells)))
    exchanges.append(Exchange(f"what is at {cell_name(number)} ?", cells[number]))
    colour = item.colour if rng.random() < 0.5 else world.colours[rng.integers(len(world.colours))]
    if not is_held_pair(world, asked, colour):
        there = any((each.object, each.colour) == (asked, colour) for each in items)
        exchanges.append(Exchange(f"is there {Group(asked, colour=colour).phrase()} ?", "yes" if there else "no"))
    if names.count(item.object) == 1:
        half = world.cell / 2
        spot = third(item.x + half, world.size), third(item.y + half, world.size)
        exchanges.append(Exchange(f"what colour is the {item.object} ?", item.colour))
        exchanges.append(Exchange(f"where is the {item.object} ?", PLACE_AT[spot]))
    if len(items) == 2 and names[0] != names[1]:
        first, second = items if rng.random() < 0.5 else reversed(items)
        for relation in RELATIONS:
            if is_related(world, first, relation, second):
                exchanges.append(Exchange(f"what is {relation} the {second.object} ?", _noun(first)))
    return exchanges


def text_exchanges(rng: np.random.Generator, world: SceneWorld, request: Request, prompt: str) -> list[Exchange]:
    """Every kind of question that the prompt alone answers, once each; the question begins with the prompt."""
    group = request.groups[rng.integers(len(request.groups))]
    absent = world.objects[rng.integers(len(world.objects))]
    counts = {each.object: each.count for each in request.groups}
    name = _name(group)
    be = "is" if group.count == 1 else "are"
    pairs = [
        ("how many things are there ?", NUMBERS[request.total]),
        (f"how many {plural(group.object)} are there ?", NUMBERS[group.count]),
        (f"how many {plural(absent)} are there ?", NUMBERS[counts.get(absent, 0)]),
        (f"what colour {be} the {name} ?", group.colour or "any"),
        ("what is drawn ?", things_to_draw(request)),
    ]
    if group.place:
        pairs.append((f"where {be} the {name} ?", group.place))
        pairs.append((f"what is {group.place} ?", group.noun()))
    if request.relation:
        first, second = request.groups
        back = OPPOSITE[request.relation]
        pairs += [
            (f"what is {request.relation} the {_name(second)} ?", first.noun()),
            (f"what is {back} the {_name(first)} ?", second.noun()),
            (f"what is {_SIDE[request.relation]} ?", first.noun()),
            (f"what is {_SIDE[back]} ?", second.noun()),
        ]
    return [Exchange(f"{prompt} . {question}", answer) for question, answer in pairs]


def sample_texts(world: SceneWorld, scenes_per_category: int = 200, seed: int = 0) -> list[str]:
    """Prompts, questions and answers to train a tokenizer on; every word of the world occurs."""
    rng = np.random.default_rng(seed)
    texts = [Group(name, count).phrase() for name in world.objects for count in (1, 2)]
    texts += [*world.colours, *PLACES, *NUMBERS, *RELATIONS, "yes", "no"]
    texts += ["1 2 3 4 5 6 7 8 9 0", NOTHING, " ".join(cell_names(world))]
    for category, weight in world.mixture:
        for _ in range(scenes_per_category if weight else 0):
            scene = sample_scene(rng, world, category)
            texts.append(scene.prompt)
            exchanges = picture_exchanges(rng, world, scene)
            exchanges += text_exchanges(rng, world, scene.request, scene.prompt)
            texts += [text for exchange in exchanges for text in exchange]
    return texts


def _noun(item: Item) -> str:
    return f"{item.colour} {item.object}"


def _name(group: Group) -> str:
    return group.object if group.count == 1 else plural(group.object)
