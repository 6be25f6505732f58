"""What a planner should know of a prompt or a picture, as numbers: who, which colour, how many, where, how likely.

A *fact vector* has two blocks, one for each group of a request, and the chances of both. A block is a row of one-hot
codes: object, colour, count, place and the group's part in the relation. A code is 0 where nothing is known. A chance
is how often a part of the group's drawings (their top left quarter, ...) lies in a cell of the patch grid.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metacanvas_jax.worlds.requests import OTHER_WORDS, PLACES, RELATIONS, Group, Request, third
from metacanvas_jax.worlds.scenes import Item, SceneWorld, place_request

GROUPS = 2  # of a request, at most
LAYOUTS = 256  # random pictures of a request in which chances are counted
WORD, CHANCE = 2.0, 4.0  # the size of a known word's entry, and of a chance of 1

PLACE_AT = {(0 if x is None else x, 0 if y is None else y): place for place, (x, y) in PLACES.items()}
"""The name of a place by its column and row of thirds."""

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Facts:
    """Fact vectors of a world. They are made of the request and of the drawn items, never of pixels."""

    def __init__(self, world: SceneWorld):
        self.world = world
        self.columns, self.side = world.size // world.patch, world.cell // world.patch
        codes = {
            "object": world.objects,
            "colour": (*world.colours, None),
            "count": tuple(range(1, world.max_count + 1)),
            "place": (*PLACES, None),
            "relation": (*RELATIONS, None),
        }
        starts = np.cumsum([0, *map(len, codes.values())])
        self.codes = codes
        self.slices = {name: slice(a, b) for name, (a, b) in zip(codes, itertools.pairwise(starts), strict=True)}
        self.block = int(starts[-1])
        self.count = GROUPS * (self.block + self.side**2)
        self._often: dict[tuple, Float[np.ndarray, "n g q"]] = {}

    def empty(self, *shape: int) -> Float[np.ndarray, "*n f"]:
        """Vectors of which nothing is known."""
        return np.zeros((*shape, self.count), np.float32)

    def known(self, number: int = 0, **words: object) -> Float[np.ndarray, " f"]:
        """The vector in which only these words (by the name of their code) of group ``number`` are known."""
        vector = self.empty()
        for name, word in words.items():
            vector[number * self.block + self.slices[name].start + self.codes[name].index(word)] = WORD
        return vector

    def everything(self, request: Request) -> Float[np.ndarray, " f"]:
        """All words of all groups, without chances."""
        vector = self.empty()
        for number, (group, role) in enumerate(zip(request.groups, roles(request), strict=True)):
            vector += self.known(number, **named(group), place=group.place, relation=role)
        return vector

    def told(self, request: Request, prompt: str) -> list[tuple[int, Float[np.ndarray, " f"]]]:
        """Ends of parts of a prompt (in characters), and what a reader knows there of the group just read.

        A reader does not know yet what the rest of the prompt says: a place or relation is known where its last word
        stands. The group is told in the first block, whichever it is.
        """
        found, at = [], 0

        def read(text: str, **words: object) -> None:
            nonlocal at
            at = prompt.index(text, at) + len(text)
            found.append((at, self.known(**words)))

        for number, (group, role) in enumerate(zip(request.groups, roles(request), strict=True)):
            words = named(group) | ({"relation": role} if number else {})
            if group.place and prompt.startswith(group.place):
                read(group.place, place=group.place)
                words["place"] = group.place
            read(group.phrase(), **words)
            if group.place and "place" not in words:
                words["place"] = group.place
                read(group.place, **words)
            if number == 0 and len(request.groups) > 1:
                join = request.relation or "and"
                join = OTHER_WORDS[join] if f" {OTHER_WORDS[join]} " in prompt[at:] else join
                read(join, **words, relation=role)
        return found

    def cells(self, request: Request) -> Float[np.ndarray, "n f"]:
        """What each cell of the patch grid should know of a request, in reading order: all words, and its chances."""
        return self.everything(request) + self.likely(self.chances(request))

    def picture(self, items: Sequence[Item]) -> Float[np.ndarray, "n f"]:
        """What each cell of a picture shows, as certainties: object, colour and place of a drawing, and which part."""
        vectors, half = self.empty(self.columns**2), self.world.cell / 2
        for item in items:
            parts = self.parts(item)
            spot = third(item.x + half, self.world.size), third(item.y + half, self.world.size)
            shows = self.known(object=item.object, colour=item.colour, place=PLACE_AT[spot])
            vectors += parts.any(-1, keepdims=True) * shows + self.likely(
                np.stack([parts, *[np.zeros_like(parts)] * (GROUPS - 1)], 1)
            )
        return vectors

    def likely(self, chances: Float[np.ndarray, "n g q"]) -> Float[np.ndarray, "n f"]:
        """Vectors of chances only."""
        vectors = self.empty(len(chances))
        vectors[:, GROUPS * self.block :] = CHANCE * chances.reshape(len(chances), -1)
        return vectors

    def chances(self, request: Request) -> Float[np.ndarray, "n g q"]:
        """How often each part of each group lies in each cell, in ``LAYOUTS`` random pictures of a request.

        They depend on counts, places and the relation only, and are counted once for each of these.
        """
        key = tuple((group.count, group.place) for group in request.groups), request.relation
        if key not in self._often:
            rng, total, drawn = np.random.default_rng(0), np.zeros((self.columns**2, GROUPS, self.side**2)), 0
            for _ in range(LAYOUTS):
                items = iter(place_request(rng, self.world, request) or ())
                for number, group in enumerate(request.groups):
                    for item in itertools.islice(items, group.count):
                        total[:, number] += self.parts(item)
                        drawn += 1
            self._often[key] = (total / max(1, drawn / request.total)).astype(np.float32)
        return self._often[key]

    def parts(self, item: Item) -> Float[np.ndarray, "n q"]:
        """Which part of a drawing lies in which cell."""
        found = np.zeros((self.columns, self.columns, self.side**2), np.float32)
        row, column = round(item.y / self.world.patch), round(item.x / self.world.patch)
        for part in range(self.side**2):
            found[row + part // self.side, column + part % self.side, part] = 1.0
        return found.reshape(self.columns**2, -1)


def named(group: Group) -> dict[str, object]:
    """The words of a group that its own phrase says."""
    return {"object": group.object, "colour": group.colour, "count": group.count}


def roles(request: Request) -> list[str | None]:
    """The part of each group in the relation: "left of" for the first means "right of" for the second."""
    return [request.relation, OPPOSITE.get(request.relation or "")][: len(request.groups)]
