"""The judge: right on perfect and slightly spoilt pictures, and not fooled by near misses."""

import dataclasses
import functools

import numpy as np
import pytest
from scipy import ndimage

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.worlds import openmoji, scenes
from metacanvas_jax.worlds.judge import Detection, Judge, check, relations
from metacanvas_jax.worlds.requests import Group, Request
from metacanvas_jax.worlds.scenes import Item, Scene, SceneWorld

pytestmark = pytest.mark.miniature

WORLD = SceneWorld()
MINIATURE = experiment(load_config("configs/miniature.py", [])).world


@pytest.fixture(scope="module")
def judge():
    return Judge(WORLD)


@functools.cache
def truths(world):
    """240 scenes of every category, held-out combinations among them, with their pictures in [0, 1]."""
    prompts = scenes.eval_prompts(world, "seen", 18) + scenes.eval_prompts(world, "held_out", 14)
    return prompts, [scenes.draw(world, scene).astype(np.float32) / 255 for scene in prompts]


@pytest.fixture(scope="module")
def truth():
    return truths(WORLD)


def _noise(sigma):
    rng = np.random.default_rng(0)
    return lambda image: np.clip(image + rng.normal(0, sigma, image.shape), 0, 1)


def _blur(sigma):
    return lambda image: np.clip(ndimage.gaussian_filter(image, (sigma, sigma, 0)), 0, 1)


@pytest.mark.parametrize("world", [WORLD, MINIATURE], ids=["larger", "miniature"])
@pytest.mark.parametrize(
    "spoil",
    [lambda image: image, _noise(0.05), _noise(0.08), _blur(0.6), lambda image: _noise(0.05)(_blur(0.5)(image))],
    ids=["perfect", "noise .05", "noise .08", "blur .6", "blur .5 and noise .05"],
)
def test_true_pictures_are_right(world, spoil):
    judge = Judge(world)
    right = [judge.judge(spoil(image), scene.metadata) for scene, image in zip(*truths(world), strict=True)]
    assert len(right) > 230
    assert np.mean(right) >= 0.99


def test_detections_say_what_is_where(judge, truth):
    for scene, image in list(zip(*truth, strict=True))[::9]:
        found = {(d.object, d.colour, d.box) for d in judge.detect((image * 255).round().astype(np.uint8))}
        assert found == {(d.object, d.colour, d.box) for d in judge.truth(scene)}
        for item, one in zip(scene.items, judge.truth(scene), strict=True):
            assert one.centre == pytest.approx((item.x + 12, item.y + 12), abs=1)


def test_larger_and_freely_placed_drawings_are_found():
    for world in (SceneWorld(size=120, patch=24, cell=48, sprite=44), SceneWorld(free_placement=True)):
        judge = Judge(world)
        for index in range(12):
            scene = scenes.training_scene(world, 0, index)
            assert judge.judge(scenes.draw(world, scene), scene.metadata), scene.prompt


def _picture(*items):
    groups = tuple(Group(item.object) for item in items[:1])
    return scenes.draw(WORLD, Scene(Request("counting", groups), items, ""))


CAT, CAR = Group("cat", colour="red"), Group("car", colour="blue")
LEFT = Request("position", (CAT, CAR), "left of").metadata()
BOTH = Request("color_attr", (CAT, CAR)).metadata()
THREE = Request("counting", (Group("star", 3),)).metadata()
CORNER = Request("place", (Group("cat", colour="red", place="in the top left corner"),)).metadata()
RIGHT_LAYOUT = (Item("cat", "red", 0, 12), Item("car", "blue", 36, 12))
STARS = tuple(Item("star", "green", x, y) for x, y in ((0, 0), (36, 0), (0, 36), (36, 36)))


@pytest.mark.parametrize(
    ("metadata", "items", "right"),
    [
        (LEFT, RIGHT_LAYOUT, True),
        (LEFT, (Item("cat", "red", 36, 12), Item("car", "blue", 0, 12)), False),
        (LEFT, (Item("cat", "blue", 0, 12), Item("car", "red", 36, 12)), False),
        (LEFT, (Item("cat", "red", 12, 0), Item("car", "blue", 12, 36)), False),
        (BOTH, RIGHT_LAYOUT, True),
        (BOTH, (Item("cat", "red", 0, 12), Item("car", "green", 36, 12)), False),
        (BOTH, (Item("cat", "red", 0, 12),), False),
        (BOTH, (*RIGHT_LAYOUT, Item("key", "red", 0, 36)), False),
        (BOTH, (*RIGHT_LAYOUT, Item("cat", "red", 0, 36)), False),
        (THREE, STARS[:3], True),
        (THREE, STARS[:2], False),
        (THREE, STARS, False),
        (CORNER, (Item("cat", "red", 0, 0),), True),
        (CORNER, (Item("cat", "red", 36, 0),), False),
        (CORNER, (Item("cat", "red", 12, 0),), False),
    ],
    ids=[
        *("relation holds", "relation swapped", "colours swapped", "above, not left"),
        *("colours hold", "wrong colour", "one missing", "a third thing", "one twice"),
        *("three", "two of three", "four of three", "place holds", "other corner", "beside the corner"),
    ],
)
def test_near_misses(judge, metadata, items, right):
    assert judge.judge(_picture(*items), metadata) == right


def test_single_object_may_have_any_colour(judge):
    metadata = Request("single_object", (Group("cat"),)).metadata()
    assert all(judge.judge(_picture(Item("cat", colour, 12, 24)), metadata) for colour in WORLD.colours)


def test_half_one_drawing_half_another_is_neither(judge):
    """Every two objects of one colour, cut down the middle: all but a few that differ by a hair's breadth."""
    sprites = openmoji.sprites(WORLD.objects, WORLD.colours, WORLD.sprite, WORLD.cell)
    accepted = total = 0
    for a in range(12):
        for b in range(12):
            for colour in (0, 3) if a != b else ():
                picture = np.ones((60, 60, 3), np.float32)
                picture[12:36, 24:36], picture[12:36, 36:48] = sprites[a, colour, :, :12], sprites[b, colour, :, 12:]
                accepted += any(found.object for found in judge.detect(picture))
                total += 1
    assert total == 264
    assert accepted <= 3


@pytest.mark.parametrize("colours", [("red", "green"), ("purple", "blue"), ("yellow", "orange")])
def test_two_colours_in_one_drawing_are_neither(judge, colours):
    sprites = openmoji.sprites(WORLD.objects, WORLD.colours, WORLD.sprite, WORLD.cell)
    a, b = (WORLD.colours.index(colour) for colour in colours)
    for kind in range(12):
        picture = np.ones((60, 60, 3), np.float32)
        picture[:24, :12], picture[:24, 12:24] = sprites[kind, a, :, :12], sprites[kind, b, :, 12:]
        assert all(found.object is None for found in judge.detect(picture)), WORLD.objects[kind]


def test_junk_beside_the_drawing_is_noticed_unless_lenient(judge):
    picture = _picture(*RIGHT_LAYOUT)
    picture[50:56, 20:26] = (200, 40, 40)
    verdict = judge.verdict(picture, BOTH)
    assert not verdict.correct
    assert verdict.reasons == ("found 1 unknown, expected 0",)
    assert verdict.detections[-1].box == (20, 50, 26, 56)
    assert Judge(WORLD, strict=False).judge(picture, BOTH)


def test_scrambled_patches_are_no_drawing(judge):
    """Right colours and patch shapes in the wrong places, as an untrained painter leaves them."""
    picture = _picture(Item("cat", "red", 12, 12))
    picture[12:24, 12:36] = picture[12:24, 12:36][:, ::-1].copy()
    assert [found.object for found in judge.detect(picture)] in ([None], [None, None])


def test_blank_picture_holds_nothing(judge):
    blank = np.full((60, 60, 3), 255, np.uint8)
    assert judge.detect(blank) == []
    assert not judge.judge(blank, THREE)


def test_wrong_size_and_range_are_refused(judge):
    with pytest.raises(ValueError, match=r"\(60, 60, 3\)"):
        judge.detect(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        judge.detect(np.full((60, 60, 3), -1.0))
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        judge.detect(np.full((60, 60, 3), np.nan))


def _box(x, y, side=20.0):
    return Detection("cat", "red", (x, y, x + side, y + side), 0.0)


def test_relations_follow_genevals_slack_and_angle():
    """Worked by hand from geneval's relative_position: slack 0.1 (20 + 20) = 4 px, then more than half the distance."""
    assert relations(_box(0, 0), _box(30, 0)) == {"left of"}
    assert relations(_box(0, 40), _box(0, 0)) == {"below"}
    assert relations(_box(0, 0), _box(3, 3)) == set()
    assert relations(_box(0, 0), _box(30, 30)) == {"left of", "above"}
    assert relations(_box(0, 0), _box(40, 16)) == {"left of"}


def test_exclude_applies_without_strictness(judge):
    found = [dataclasses.replace(_box(x, 0), object="star") for x in (0, 20, 40)]
    two = Request("counting", (Group("star", 2),)).metadata()
    assert check(found, two, 60, strict=False) == ["expected fewer than 3 star"]
