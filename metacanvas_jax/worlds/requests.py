"""The content of a prompt (groups of objects with colours, counts, relation and places), and its words."""

import dataclasses
from typing import Any

RELATIONS = ("left of", "right of", "above", "below")
"""A relation of the first group to the second, in GenEval's words."""

PLACES = {
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
    "in the centre": (0, 0),
    "at the top": (None, -1),
    "at the bottom": (None, 1),
    "on the left": (-1, None),
    "on the right": (1, None),
}
"""Absolute places: the third of the picture's width and height (-1 first, 0 middle, 1 last) that the centre lies in."""

GENEVAL_CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CATEGORIES = (*GENEVAL_CATEGORIES, "place", "group")
"""GenEval's six, absolute places, and a relation between groups ("two red cats left of a blue car")."""

JUDGED = (*GENEVAL_CATEGORIES, "place")
"""The categories that runs are scored on."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

OTHER_WORDS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "over",
    "below": "under",
    "and": "with",
}
"""The second way of saying what joins two groups."""


def plural(noun: str) -> str:
    """The plural of an object's name."""
    if noun == "fish":
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def third(position: float, extent: float) -> int:
    """Which third of the extent a coordinate lies in: -1, 0 or 1."""
    return (position > extent / 3) + (position > 2 * extent / 3) - 1


def in_place(place: str, x: float, y: float, size: float) -> bool:
    """Whether a centre at (x, y) of a square picture is where the place says."""
    wanted_x, wanted_y = PLACES[place]
    return wanted_x in (None, third(x, size)) and wanted_y in (None, third(y, size))


@dataclasses.dataclass(frozen=True)
class Group:
    """Some objects of one kind. A colour or place of None is not specified."""

    object: str
    count: int = 1
    colour: str | None = None
    place: str | None = None

    def noun(self) -> str:
        """The group without article, number or place: "red cat", "cats"."""
        name = self.object if self.count == 1 else plural(self.object)
        return f"{self.colour} {name}" if self.colour else name

    def phrase(self) -> str:
        """The group with its article or number: "a red cat", "three cats"."""
        noun = self.noun()
        if self.count > 1:
            return f"{NUMBERS[self.count]} {noun}"
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt's content. ``relation`` holds between every object of the first group and every one of the second."""

    category: str
    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def total(self) -> int:
        """How many objects there are."""
        return sum(group.count for group in self.groups)

    def prompt(self, plain: bool = True) -> str:
        """The request in words; ``plain=False`` gives a second way of saying it, where there is one."""
        placed = [f"{group.phrase()} {group.place}" if group.place else group.phrase() for group in self.groups]
        if len(self.groups) == 1 and self.groups[0].place and not plain:
            return f"{self.groups[0].place} {self.groups[0].phrase()}"
        join = self.relation or "and"
        return f" {join if plain else OTHER_WORDS[join]} ".join(placed)

    def metadata(self, prompt: str | None = None) -> dict[str, Any]:
        """The request in GenEval's metadata format (geneval, prompts/evaluation_metadata.jsonl).

        As there, the target of a relation comes first. The key ``place`` is this project's addition.
        """
        include: list[dict[str, Any]] = []
        for group in reversed(self.groups) if self.relation else self.groups:
            clause: dict[str, Any] = {"class": group.object, "count": group.count}
            if group.colour:
                clause["color"] = group.colour
            if group.place:
                clause["place"] = group.place
            include.append(clause)
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        metadata: dict[str, Any] = {"tag": self.category, "include": include}
        if self.category == "counting":
            metadata["exclude"] = [{"class": group.object, "count": group.count + 1} for group in self.groups]
        return {**metadata, "prompt": self.prompt() if prompt is None else prompt}
