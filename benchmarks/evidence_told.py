"""What the text encoders of the comparisons learn to tell: of prompts of scenes, of instructions, of motions.

A lesson is a text and, for some of its ends in characters, a vector: what a reader who has come so far knows of the
part just read.
"""

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from metacanvas_jax.worlds.animations import MOTIONS, Animation, animation, edited
from metacanvas_jax.worlds.edits import KINDS, edit
from metacanvas_jax.worlds.facts import WORD, Facts
from metacanvas_jax.worlds.requests import NUMBERS, PLACES, Group, plural
from metacanvas_jax.worlds.scenes import SceneWorld, sample_words

Lesson = tuple[str, list[tuple[int, Float[np.ndarray, " c"]]]]
POOL = 20_000  # instructions and motions, from which lessons are drawn


def scenes(world: SceneWorld, rng: np.random.Generator) -> tuple[int, Callable[[], Lesson]]:
    """The number of channels, and a maker of lessons on prompts of scenes."""
    facts = Facts(world)

    def lesson() -> Lesson:
        request, prompt = sample_words(rng, world, None)
        return prompt, [(end, vector[: facts.block]) for end, vector in facts.told(request, prompt)]

    return facts.block, lesson


def tasks(world: SceneWorld, rng: np.random.Generator) -> tuple[int, Callable[[], Lesson]]:
    """The same for instructions of edits, of pictures and videos, and for motions."""
    seed = int(rng.integers(2**31))
    told = Told(world)

    def numbered(index: int) -> Lesson:
        made = animation(world, seed, index)
        if index % 3 == 0:
            return told.instruction(edit(world, seed, index).instruction)
        return told.motions(made) if index % 3 == 1 else told.instruction(edited(world, made, seed, index)[1])

    pool = [numbered(index) for index in range(POOL)]
    return told.channels, lambda: pool[rng.integers(POOL)]


class Told:
    """Vectors of instructions and motions: a group, what it becomes, the kind of an edit, and a motion."""

    def __init__(self, world: SceneWorld):
        self.facts = Facts(world)
        self.kinds = 2 * self.facts.block
        self.moves = self.kinds + len(KINDS)
        self.channels = self.moves + len(MOTIONS)
        nouns = "|".join(word for name in world.objects for word in (plural(name), name))
        self.group = re.compile(rf"(?:({'|'.join(world.colours)}) )({nouns})\b")
        self.singular = {plural(name): name for name in world.objects} | {name: name for name in world.objects}

    def known(self, number: int = 0, **words: object) -> Float[np.ndarray, " c"]:
        """Some words by the name of their code: of the group that is named (0), or of what becomes of it (1)."""
        vector, block = np.zeros(self.channels, np.float32), self.facts.block
        vector[number * block : (number + 1) * block] = self.facts.known(0, **words)[:block]
        return vector

    def motions(self, made: Animation) -> Lesson:
        """Each drawing of an animation, and then its motion."""
        ends, at = [], 0
        for mover in made.movers:
            group = self.known(object=mover.object, colour=mover.colour, count=1)
            for words in (Group(mover.object, 1, mover.colour).phrase(), mover.motion):
                at = made.prompt.index(words, at) + len(words)
                group = group.copy()
                if words == mover.motion:
                    group[self.moves + list(MOTIONS).index(words)] = WORD
                ends.append((at, group))
        return made.prompt, ends

    def instruction(self, text: str) -> Lesson:
        """The group that an instruction names, and at its end what becomes of it.

        Raises ValueError for an instruction that ``worlds/edits.py`` does not make.
        """
        found, kind = self.group.search(text), _kind(text)
        if found is None:
            raise ValueError(f"the instruction {text!r} names no group")
        colour, noun = found.groups()
        vector = self.known(object=self.singular[noun], colour=colour)
        vector[self.kinds + KINDS.index(kind)] = WORD
        rest = text[found.end() :]
        becomes: dict[str, object] = {}
        if kind == "recolour":
            becomes["colour"] = rest.split()[-1]
        if kind in ("add", "move"):
            place = rest.strip().replace("to ", "in ", 1)
            becomes["place"] = place if place in PLACES else rest.strip()
        if kind == "count":
            words = text.split()
            becomes["count"] = _number(words[1] if words[0] == "show" else words[-1])
        return text, [(found.end(), vector), (len(text), vector + self.known(1, **becomes))]


def _number(word: str) -> int:
    return 1 if word in ("a", "an") else NUMBERS.index(word)


def _kind(text: str) -> str:
    first = text.split()[0]
    if first == "change":
        return "recolour" if text.startswith("change the colour") else "count"
    kinds = {"make": "recolour", "paint": "recolour", "remove": "remove", "take": "remove", "show": "count"}
    return kinds.get(first, first)
