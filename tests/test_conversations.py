"""Conversations about scenes: what of them the MLLM learns to say, and how it sees the picture."""

import numpy as np
import pytest

from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import MediaConfig
from metacanvas_jax.mllm.prompt import END, PromptConfig, Prompter
from metacanvas_jax.worlds.questions import Exchange, sample_texts
from metacanvas_jax.worlds.scenes import SceneWorld, sample_scene

WORLD = SceneWorld(objects=("cat", "car", "tree", "star"))
PROMPT = "a red cat and a blue car"
TURNS = [
    Exchange(f"{PROMPT} . how many things are there ?", "two"),
    Exchange(f"{PROMPT} . what is drawn ?", "1 red cat"),
]


@pytest.fixture(scope="module")
def prompter():
    media = MediaConfig(patch=6, merge=2, image_pixels=(144, 3600))
    config = PromptConfig(buckets=(96,), system=None, assistant=True, media=media)
    return Prompter(train_tokenizer(sample_texts(WORLD, 20)), config)


def spoken(prompter, example):
    """The runs of tokens that weigh 1, as text."""
    runs, ids = [], example["tokens"]
    learned = np.flatnonzero(example["weights"] == 1.0)
    for run in np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1):
        assert ids[run[-1]] == prompter.ids[END]
        runs.append(prompter.decode(ids[run[:-1]]))
    return runs


def test_a_conversation_gives_the_prompt_once_and_weighs_every_answer(prompter):
    example = UnderstandExamples(prompter, WORLD, 96).encode(TURNS, None)
    assert spoken(prompter, example) == ["two", "1 red cat"]
    text = prompter.decode(example["tokens"][example["mask"]])
    assert text.count(PROMPT) == 1
    assert text.count("what is drawn ?") == 1
    real = int(example["mask"].sum())
    np.testing.assert_array_equal(example["positions"][:, :real], np.broadcast_to(np.arange(real), (3, real)))
    assert real < 96 and not example["weights"][real:].any()
    assert np.all(example["slots"] >= 96)


def test_the_picture_stands_before_the_first_question_and_is_not_to_be_said(prompter):
    image = np.full((60, 60, 3), 255, np.uint8)
    examples = UnderstandExamples(prompter, WORLD, 96)
    example = examples.encode([Exchange("how many things are there ?", "two")], image)
    slots = example["slots"][0]
    np.testing.assert_array_equal(np.diff(slots), 1)
    assert not example["weights"][slots].any()
    first_answer = np.argmax(example["weights"] == 1.0)
    assert slots[-1] < first_answer
    # An image of 5 x 5 merged patches takes 5 positions, so that text goes on before its own number of tokens.
    assert example["positions"][0, first_answer] == first_answer - 25 + 5


def test_as_many_exchanges_are_taken_as_fit(prompter):
    rng = np.random.default_rng(0)
    counts = []
    for length in (48, 96):
        examples = UnderstandExamples(prompter, WORLD, length, picture_share=0.0, sheet_share=0.0)
        made = []
        for _ in range(20):
            scene = sample_scene(rng, WORLD, "color_attr")
            sample = Sample(scene.prompt, np.zeros((1, 60, 60, 3), np.uint8), scene=scene.to_json())
            made.append(examples(sample, rng))
        assert all(example["mask"].sum() <= length for example in made)
        counts.append(np.mean([len(spoken(prompter, example)) for example in made]))
    assert 1 <= counts[0] < counts[1]


def test_a_conversation_too_long_for_its_row_is_refused(prompter):
    with pytest.raises(UserError, match="tokens, more than 24"):
        UnderstandExamples(prompter, WORLD, 24).encode(TURNS, None)
