"""The judge of edits: right on what was asked, also with noise, and not fooled by near misses."""

import dataclasses
import functools

import numpy as np
import pytest

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.worlds import edits
from metacanvas_jax.worlds.edits import Edit
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.judge_edits import edit_verdict
from metacanvas_jax.worlds.scenes import Item, SceneWorld, draw_items

pytestmark = pytest.mark.miniature

WORLD = SceneWorld()
MINIATURE = experiment(load_config("configs/miniature.py", [])).world

CAT, CAR, STAR = Item("cat", "red", 0, 0), Item("car", "blue", 36, 0), Item("star", "green", 0, 36)
SCENE = (CAT, CAR)
CORNER = Item("star", "green", 36, 36)


def at(item, x, y):
    return dataclasses.replace(item, x=x, y=y)


def coloured(item, colour):
    return dataclasses.replace(item, colour=colour)


def edit(kind, source, target, place=None):
    return Edit(kind, source, target, kind, place, tuple(item for item in target if item not in source))


RECOLOUR = edit("recolour", SCENE, (coloured(CAT, "green"), CAR))
ADD = edit("add", SCENE, (*SCENE, CORNER), "in the bottom right corner")
REMOVE = edit("remove", (*SCENE, STAR), SCENE)
MOVE = edit("move", SCENE, (at(CAT, 0, 36), CAR), "in the bottom left corner")
MORE = edit("count", SCENE, (*SCENE, at(CAT, 0, 36), at(CAT, 36, 36)))
FEWER = edit("count", (CAT, at(CAT, 36, 0), at(CAT, 36, 36), STAR), (CAT, at(CAT, 36, 0), STAR))

RIGHT = {
    "recoloured": (RECOLOUR, RECOLOUR.target),
    "added": (ADD, ADD.target),
    "added, at another spot of the place": (ADD, (*SCENE, at(CORNER, 33, 33))),
    "removed": (REMOVE, SCENE),
    "moved": (MOVE, MOVE.target),
    "three of them": (MORE, MORE.target),
    "three of them, the new ones elsewhere": (MORE, (*SCENE, at(CAT, 12, 30), at(CAT, 36, 36))),
    "two of three": (FEWER, FEWER.target),
    "two other ones of three": (FEWER, (at(CAT, 36, 0), at(CAT, 36, 36), STAR)),
}
WRONG = {
    "recolour: nothing changed": (RECOLOUR, SCENE),
    "recolour: another colour": (RECOLOUR, (coloured(CAT, "yellow"), CAR)),
    "recolour: the other one": (RECOLOUR, (CAT, coloured(CAR, "green"))),
    "recolour: both": (RECOLOUR, (coloured(CAT, "green"), coloured(CAR, "green"))),
    "recolour: moved, too": (RECOLOUR, (at(coloured(CAT, "green"), 0, 12), CAR)),
    "recolour: the other one moved": (RECOLOUR, (coloured(CAT, "green"), at(CAR, 36, 12))),
    "recolour: the other one gone": (RECOLOUR, (coloured(CAT, "green"),)),
    "recolour: one more thing": (RECOLOUR, (*RECOLOUR.target, STAR)),
    "recolour: another object": (RECOLOUR, (Item("duck", "green", 0, 0), CAR)),
    "add: nothing changed": (ADD, SCENE),
    "add: another object": (ADD, (*SCENE, Item("key", "green", 36, 36))),
    "add: another colour": (ADD, (*SCENE, coloured(CORNER, "red"))),
    "add: another place": (ADD, (*SCENE, STAR)),
    "add: two": (ADD, (*SCENE, CORNER, STAR)),
    "add: in place of another": (ADD, (CAT, CORNER)),
    "add: the others moved": (ADD, (at(CAT, 0, 12), CAR, CORNER)),
    "remove: nothing changed": (REMOVE, REMOVE.source),
    "remove: another one": (REMOVE, (CAT, STAR)),
    "remove: everything": (REMOVE, ()),
    "remove: the rest moved": (REMOVE, (CAT, at(CAR, 36, 12))),
    "remove: the rest recoloured": (REMOVE, (CAT, coloured(CAR, "red"))),
    "move: nothing changed": (MOVE, SCENE),
    "move: elsewhere": (MOVE, (at(CAT, 36, 36), CAR)),
    "move: a copy": (MOVE, (*SCENE, at(CAT, 0, 36))),
    "move: the other one": (MOVE, (CAT, at(CAR, 0, 36))),
    "move: recoloured": (MOVE, (at(coloured(CAT, "blue"), 0, 36), CAR)),
    "move: the other one, too": (MOVE, (at(CAT, 0, 36), at(CAR, 36, 12))),
    "count: nothing changed": (MORE, SCENE),
    "count: one too few": (MORE, (*SCENE, at(CAT, 0, 36))),
    "count: another colour": (MORE, (*SCENE, at(CAT, 0, 36), at(coloured(CAT, "blue"), 36, 36))),
    "count: more of the other": (MORE, (*SCENE, at(CAR, 0, 36), at(CAR, 36, 36))),
    "count: the first one moved": (MORE, (at(CAT, 6, 6), CAR, at(CAT, 0, 36), at(CAT, 36, 36))),
    "count: the other one gone": (MORE, (CAT, at(CAT, 0, 36), at(CAT, 36, 36))),
    "count: one too many": (FEWER, FEWER.source),
    "count: too few left": (FEWER, (CAT, STAR)),
    "count: what stays moved": (FEWER, (CAT, at(CAT, 36, 18), STAR)),
    "count: the other one recoloured": (FEWER, (CAT, at(CAT, 36, 0), coloured(STAR, "red"))),
}


@functools.cache
def judge(world=WORLD):
    return Judge(world)


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.08])
@pytest.mark.parametrize("world", [WORLD, MINIATURE], ids=["larger", "miniature"])
def test_true_edits_are_right(world, sigma):
    rng = np.random.default_rng(0)
    wrong = []
    for i in range(60):
        made = Edit.from_json(edits.edit(world, 7, i).to_json())
        picture = draw_items(world, made.target) / 255 + rng.normal(0, sigma, (60, 60, 3))
        verdict = edit_verdict(judge(world), np.clip(picture, 0, 1), made)
        wrong += [] if verdict.correct else [(made.instruction, verdict.reasons)]
    assert not wrong


@pytest.mark.parametrize("case", RIGHT)
def test_any_result_that_the_words_allow_is_right(case):
    made, items = RIGHT[case]
    assert edit_verdict(judge(), draw_items(WORLD, items), made).reasons == ()


@pytest.mark.parametrize("case", WRONG)
def test_near_misses_are_refused(case):
    made, items = WRONG[case]
    verdict = edit_verdict(judge(), draw_items(WORLD, items), made)
    assert not verdict.correct and verdict.reasons


def test_reasons_name_what_is_wrong():
    def reasons(case):
        made, items = WRONG[case]
        return edit_verdict(judge(), draw_items(WORLD, items), made).reasons

    assert reasons("recolour: another colour") == (
        "expected the green cat in its place",
        "found yellow cat that nothing asks for",
    )
    assert reasons("add: another place") == ("expected the green star in the bottom right corner",)
    assert reasons("count: one too few") == ("expected 3 red cat, found 2",)
    assert reasons("count: the first one moved") == ("expected 1 red cat to stay, 0 did",)


def test_junk_beside_the_edit_is_noticed():
    picture = draw_items(WORLD, RECOLOUR.target)
    picture[50:56, 20:26] = (200, 40, 40)
    assert edit_verdict(judge(), picture, RECOLOUR).reasons == ("found something unknown that nothing asks for",)
