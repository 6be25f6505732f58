"""Facts: what each state of a small MLLM should tell, where it stands, and how a canvas begins there."""

import jax.numpy as jnp
import numpy as np
import pytest
from miniature_support import config

from metacanvas_jax.config.read import experiment
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import MediaConfig
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.train.objectives import fact_loss
from metacanvas_jax.worlds.facts import CHANCE, GROUPS, Facts
from metacanvas_jax.worlds.questions import cell_name, cell_names, sample_texts
from metacanvas_jax.worlds.requests import Group, Request
from metacanvas_jax.worlds.scenes import Item, SceneWorld, draw, sample_scene

WORLD = SceneWorld(patch=15, cell=30, sprite=28, objects=("cat", "car", "tree", "star"))
FACTS = Facts(WORLD)
LEFT = Request("position", (Group("cat", 2, "red"), Group("car", colour="blue")), "left of")


@pytest.fixture(scope="module")
def prompter():
    media = MediaConfig(patch=15, merge=1, image_pixels=(144, 3600))
    buckets = PromptConfig(buckets=(64,), system=None, assistant=True, media=media)
    return Prompter(train_tokenizer(sample_texts(WORLD, 20)), buckets)


def words(vector):
    """The known words of both groups."""
    found = []
    for group in range(GROUPS):
        block = vector[group * FACTS.block : (group + 1) * FACTS.block]
        for name, part in FACTS.slices.items():
            found += [(group, FACTS.codes[name][i]) for i in np.flatnonzero(block[part])]
    return found


def test_a_reader_knows_a_place_or_relation_where_its_last_word_stands():
    told = {LEFT.prompt()[:end]: words(vector) for end, vector in FACTS.told(LEFT, LEFT.prompt())}
    assert told == {
        "two red cats": [(0, "cat"), (0, "red"), (0, 2)],
        "two red cats left of": [(0, "cat"), (0, "red"), (0, 2), (0, "left of")],
        LEFT.prompt(): [(0, "car"), (0, "blue"), (0, 1), (0, "right of")],
    }
    placed = Request("place", (Group("cat", place="at the top"),))
    for plain in (True, False):
        prompt = placed.prompt(plain)
        last_end, last = FACTS.told(placed, prompt)[-1]
        assert last_end == len(prompt)
        assert words(last) == [(0, "cat"), (0, None), (0, 1), (0, "at the top")]
    reworded = LEFT.prompt(plain=False)
    assert [reworded[:end] for end, _ in FACTS.told(LEFT, reworded)][1] == "two red cats to the left of"


def test_chances_are_those_of_random_pictures():
    corner = Request("place", (Group("cat", place="in the top left corner"),))
    chances = FACTS.chances(corner)
    assert chances[0, 0, 0] == chances[1, 0, 1] == chances[4, 0, 2] == chances[5, 0, 3] == 1.0
    assert chances.sum() == 4.0
    free = FACTS.chances(Request("single_object", (Group("cat"),)))
    np.testing.assert_allclose(free[:, 0].sum(0), 1.0)
    np.testing.assert_allclose(free[5, 0], 1 / 9, atol=0.06)
    both = FACTS.chances(LEFT)
    np.testing.assert_allclose(both[:, 0].sum(0), 2.0, rtol=1e-5)
    assert both[:, 1].reshape(4, 4, 4)[:, :2].sum() == 0.0, "what is right of two cats is not in the left half"


def test_a_cell_of_a_picture_tells_what_it_shows():
    cells = FACTS.picture([Item("cat", "red", 0, 0)])
    assert words(cells[5]) == [(0, "cat"), (0, "red"), (0, "in the top left corner")]
    np.testing.assert_array_equal(cells[5, GROUPS * FACTS.block :], CHANCE * np.eye(8)[3])
    assert not cells[2].any()


def test_a_sheet_stands_after_the_prompt_where_a_canvas_would(prompter):
    examples = UnderstandExamples(prompter, WORLD, 64)
    example = examples.sheet(LEFT, LEFT.prompt())
    real = int(example["mask"].sum())
    text = prompter.decode(example["tokens"][:real])
    assert text.endswith(LEFT.prompt() + " " + " ".join(cell_names(WORLD)))
    end = real - 16 - 1
    everything = [(0, "cat"), (0, "red"), (0, 2), (0, None), (0, "left of")]
    assert words(example["facts"][end])[:5] == everything == words(example["facts"][real - 1])[:5]
    np.testing.assert_allclose(example["facts"][real - 16 : real], FACTS.cells(LEFT))
    assert words(example["facts"][end - 1]) == [(0, "car"), (0, "blue"), (0, 1), (0, "right of")]
    assert example["telling"][:real].all() and not example["telling"][real:].any()
    np.testing.assert_array_equal(
        example["positions"][1:, real - 16 : real] - real + 16, np.indices((4, 4)).reshape(2, 16)
    )
    assert not examples.sheet(None, "")["facts"].any()
    with pytest.raises(UserError, match="its sheet have"):
        UnderstandExamples(prompter, WORLD, 20).sheet(LEFT, LEFT.prompt())


def test_the_tokens_of_a_picture_tell_what_they_show(prompter):
    scene = sample_scene(np.random.default_rng(1), WORLD, "color_attr")
    sample = Sample(scene.prompt, draw(WORLD, scene)[None], scene=scene.to_json())
    example = UnderstandExamples(prompter, WORLD, 64, picture_share=1.0)(sample, np.random.default_rng(0))
    assert np.all(example["tokens"][example["telling"]] == prompter.ids["<|image_pad|>"])
    np.testing.assert_array_equal(example["facts"][example["telling"]], FACTS.picture(scene.items))


def test_states_that_tell_say_facts_in_their_first_channels_and_nothing_in_the_others():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32).at[..., 2:].set(0.0)
    telling = jnp.asarray([[True, False, False], [False, True, False]])
    loss = fact_loss(hidden, hidden[..., :2].at[1, 1, 0].add(2.0).at[0, 1].add(9.0), telling)
    assert abs(float(loss) - 2.0) < 1e-5  # 4 in one of two states
    chatty = hidden.at[0, 0, 3].set(1.0).at[0, 1, 3].set(5.0)
    assert abs(float(fact_loss(chatty, hidden[..., :2], telling)) - 0.5) < 1e-5


def test_cells_are_named_in_reading_order_without_end():
    assert cell_names(WORLD) == list("ABCDEFGHIJKLMNOP")
    assert [cell_name(number) for number in (25, 26, 27, 52)] == ["Z", "AA", "AB", "BA"]


def test_an_mllm_too_narrow_for_its_facts_is_refused(tmp_path):
    narrow = config(tmp_path, "mllm")
    narrow.facts = 0.3
    with pytest.raises(UserError, match=r"mllm\.language\.width is 32, expected at least 84"):
        experiment(narrow)
