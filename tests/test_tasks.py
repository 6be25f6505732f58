"""The task table, column by column: what the MLLM reads, what the DiT is given, noise levels and loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks_support import SIZE, Pick, Spy, bucket, prompter, sample

from metacanvas_jax.data.examples import PaintExamples, TextRows
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import (
    TASKS,
    Bucket,
    frame_levels,
    loss_mask,
    replace_first_frame,
)
from metacanvas_jax.text.prompts import first_and_last
from metacanvas_jax.train.objectives import painting
from metacanvas_jax.types import Given, States

LATENT = (SIZE[0] // 8, SIZE[1] // 8)
IMAGE, VIDEO = (1, 16, 36), (2, 16, 36)  # patches of a picture and of four frames: 8 x 18 tokens, twice for the video
MERGED = 144
# Media in the prompt: (grid in patches, how many); and the tokens of prompt and media together.
READS = {
    "text_to_image": (None, 0, 8),
    "reconstruction": (IMAGE, 1, 8 + MERGED + 2),
    "image_editing": (IMAGE, 1, 8 + MERGED + 2),
    "text_to_video": (None, 0, 8),
    "image_to_video": (IMAGE, 1, 8 + MERGED + 2),
    "video_editing": (VIDEO, 1, 8 + 2 * MERGED + 2),
    "reference_to_video": (IMAGE, 2, 8 + 2 * (MERGED + 2)),
}


@pytest.fixture(scope="module")
def prompts():
    return prompter()


def batch_of(prompts, task, length=512):
    examples = PaintExamples(prompts, bucket(task, length))
    rng = np.random.default_rng(0)
    return examples.collate([examples(sample(task, seed), rng) for seed in (0, 1)])


@pytest.mark.parametrize("task", TASKS)
def test_the_mllm_reads_the_media_of_the_task_before_the_prompt(prompts, task):
    batch = batch_of(prompts, task)
    grid, count, tokens = READS[task]
    media = batch.get("media", ())
    if grid is None:
        assert media == ()
    else:
        assert media[0].grid == grid
        assert media[0].patches.shape == (2, count, int(np.prod(grid)), 1176)
        merged = int(np.prod(grid)) // 4
        assert media[0].slots.shape == (2, count, merged)
        placeholder = prompts.ids["<|video_pad|>" if grid == VIDEO else "<|image_pad|>"]
        for row, slots in zip(batch["tokens"], media[0].slots, strict=True):
            assert (row[slots.reshape(-1)] == placeholder).all()
            assert np.sum(row == placeholder) == count * merged
    assert batch["mask"].sum(axis=1).tolist() == [tokens, tokens]
    assert batch["tokens"].shape == (2, 512)


# Four frames stand for 9/8 s; a grid of two for 0.5625 s, which at two positions a second is 1.125, rounded down.
TIMES = {IMAGE: [0], VIDEO: [0, 1]}


@pytest.mark.parametrize("task", TASKS)
def test_positions_of_every_token_of_a_task(prompts, task):
    batch = batch_of(prompts, task)
    grid, media, _ = READS[task]
    tokens, mask = batch["tokens"][0], batch["mask"][0]
    pads = [prompts.ids["<|image_pad|>"], prompts.ids["<|video_pad|>"]]
    place, free, blocks = 0, 0, 0
    while mask[place]:
        found = batch["positions"][0][:, place:]
        if tokens[place] not in pads:  # a word, or the sign before or after a medium: all three axes move together
            np.testing.assert_array_equal(found[:, 0], [free] * 3)
            place, free = place + 1, free + 1
            continue
        block = [(time, row, column) for time in TIMES[grid] for row in range(8) for column in range(18)]
        np.testing.assert_array_equal(found[:, : len(block)], free + np.transpose(block))
        place, free, blocks = place + len(block), free + 18, blocks + 1
    assert blocks == media and not mask[place:].any()
    assert not batch["positions"][0][:, place:].any()


@pytest.mark.parametrize(
    ("task", "source", "medium"),
    [
        ("image_editing", True, lambda s: s.source[0]),
        ("image_to_video", False, lambda s: s.target[0]),
        ("reconstruction", False, lambda s: s.target[0]),
    ],
)
def test_the_picture_in_the_prompt_is_the_right_one(prompts, task, source, medium):
    from metacanvas_jax.mllm.media import read_image

    batch = batch_of(prompts, task)
    assert ("source" in batch) == source
    for row, seed in enumerate((0, 1)):
        expected = read_image(medium(sample(task, seed)), prompts.config.media).values
        np.testing.assert_array_equal(batch["media"][0].patches[row, 0], expected)


def test_fewer_references_repeat_and_more_are_left_out(prompts):
    examples = PaintExamples(prompts, bucket("reference_to_video"))
    one = sample("reference_to_video")
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(examples(one, rng)["references"], np.stack(one.references[:2]))
    alone = dataclasses.replace(one, references=one.references[:1])
    np.testing.assert_array_equal(examples(alone, rng)["references"], np.stack([one.references[0]] * 2))
    with pytest.raises(UserError, match="has no references"):
        examples(dataclasses.replace(one, references=()), rng)


def test_a_long_prompt_loses_its_last_words_and_never_its_media(prompts):
    long = dataclasses.replace(sample("image_editing"), prompt="make the cat red " * 40)
    examples = PaintExamples(prompts, bucket("image_editing", length=MERGED + 30))
    example = examples(long, np.random.default_rng(0))
    assert MERGED + 25 < example["mask"].sum() <= MERGED + 30
    assert example["tokens"][example["mask"]][-1] == prompts.ids["<|im_end|>"]
    with pytest.raises(UserError, match=f"the media of a prompt need .* the bucket has {MERGED}"):
        PaintExamples(prompts, bucket("image_editing", length=MERGED))(long, np.random.default_rng(0))


@pytest.mark.parametrize("part", ["target", "source"])
def test_a_sample_of_another_shape_is_refused(prompts, part):
    wrong = dataclasses.replace(sample("video_editing"), **{part: np.zeros((5, *SIZE, 3), np.uint8)})
    with pytest.raises(UserError, match=rf"the {part} is \[5, 32, 64, 3\], expected \[9, 32, 64, 3\]"):
        PaintExamples(prompts, bucket("video_editing"))(wrong, np.random.default_rng(0))


def run(task, prompts, *, channels, guidance=None, velocity=0.0):
    """What a training step hands to the DiT, and its loss: (seen, prepared, loss, noise)."""
    spy = Spy(velocity)
    prepare, loss = painting(spy, Pick(), TimeConfig("uniform"), channels=channels, guidance=guidance)
    key = jax.random.key(3)
    prepared = prepare({"vae": {}}, jax.tree.map(jnp.asarray, batch_of(prompts, task)), key)
    value, _ = loss({}, {}, prepared, key)
    noise = jax.random.normal(jax.random.split(key, 3)[1], prepared.latents.shape)
    return spy.seen, prepared, float(value), noise


# References in front, as frames; frames of the input channels that are marked as given, of (2 references +) 3 or 1.
GIVEN = {
    "text_to_image": (0, [0]),
    "reconstruction": (0, [0]),
    "image_editing": (0, [1]),
    "text_to_video": (0, [0, 0, 0]),
    "image_to_video": (0, [1, 0, 0]),
    "video_editing": (0, [1, 1, 1]),
    "reference_to_video": (2, [1, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_dit_is_given_clean_latents_in_its_input_channels(prompts, task):
    seen, prepared, _, _ = run(task, prompts, channels=True)
    references, marks = GIVEN[task]
    given = seen["given"]
    frames = 3 if TASKS[task].makes == "video" else 1
    assert prepared.latents.shape == (2, frames, *LATENT, 3) == seen["latents"].shape
    assert len(given.reference) == references
    assert all(z.shape == (2, 1, *LATENT, 3) for z in given.reference)
    assert given.channels.shape == (2, len(marks), *LATENT, 4)
    mask = np.asarray(given.channels[..., 3])
    np.testing.assert_array_equal(mask, np.broadcast_to(np.reshape(marks, (1, -1, 1, 1)), mask.shape))
    np.testing.assert_array_equal(given.channels[..., :3][mask == 0], 0)
    clean = {
        "image_editing": lambda s: s.source,
        "video_editing": lambda s: s.source,
        "image_to_video": lambda s: s.target[:1],
        "reference_to_video": lambda s: np.repeat(np.stack(s.references[:2]), 4, axis=0)[:5],
    }
    if task in clean:
        pixels = np.stack([clean[task](sample(task, seed)) for seed in (0, 1)]).astype(np.float32) / 127.5 - 1
        expected = Pick().encode(jnp.asarray(pixels))
        found = given.channels[:, np.asarray(marks) == 1][..., :3]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        if references:
            np.testing.assert_allclose(np.concatenate(given.reference, axis=1), expected, atol=1e-6)


def test_without_input_channels_a_source_is_a_reference(prompts):
    seen, prepared, _, _ = run("image_editing", prompts, channels=False, guidance=3.5)
    given = seen["given"]
    assert given.channels is None
    (source,) = given.reference
    np.testing.assert_array_equal(source, prepared.given.source)
    np.testing.assert_array_equal(given.guidance, [3.5, 3.5])
    assert run("text_to_image", prompts, channels=False)[0]["given"].reference == ()


@pytest.mark.parametrize("task", TASKS)
def test_only_a_given_first_frame_is_clean_at_level_zero_and_without_loss(prompts, task):
    seen, prepared, loss, noise = run(task, prompts, channels=False, velocity=0.5)
    target = np.asarray(noise - prepared.latents)
    if task == "image_to_video":
        assert seen["time"].shape == (2, 3)
        np.testing.assert_array_equal(seen["time"][:, 0], 0)
        assert (np.asarray(seen["time"][:, 1:]) > 0).all()
        np.testing.assert_array_equal(seen["latents"][:, 0], prepared.latents[:, 0])
        target = target[:, 1:]
    else:
        assert seen["time"].shape == (2,)
        assert np.abs(np.asarray(seen["latents"][:, 0] - prepared.latents[:, 0])).max() > 0.1
    np.testing.assert_allclose(loss, np.mean((target - 0.5) ** 2), rtol=1e-5)


def test_a_clean_first_frame_is_that_of_the_expanded_timesteps_of_diffusers():
    noisy, image = (np.random.default_rng(i).standard_normal((2, n, 4, 6, 5), np.float32) for i, n in ((0, 3), (1, 1)))
    time, task = np.array([0.999, 0.3], np.float32), TASKS["image_to_video"]
    mask = np.ones((1, 3, 4, 6, 1), np.float32)  # diffusers' first_frame_mask
    mask[:, 0] = 0
    np.testing.assert_array_equal(replace_first_frame(noisy, jnp.asarray(image)), (1 - mask) * image + mask * noisy)
    np.testing.assert_array_equal(frame_levels(task, time, 3), mask[:, :, 0, 0, 0] * time[:, None])
    np.testing.assert_array_equal(loss_mask(task, 2, 3), np.repeat(mask[:, :, :1, :1, 0], 2, axis=0) == 1)


def test_reference_frames_never_get_a_canvas():
    from metacanvas_jax.connectors.canvas import CanvasConnector, CanvasConnectorConfig

    keys = jax.random.split(jax.random.key(0), 5)
    wan = Wan(WanConfig(latent_channels=3, heads=2, head_width=32, mlp=8, layers=1, context_width=4, freq=8))
    latents = jax.random.normal(keys[0], (1, 3, *LATENT, 3))
    text = States(jnp.zeros((1, 1, 4)))
    given = Given(reference=(jax.random.normal(keys[1], (1, 2, *LATENT, 3)),))
    variables = wan.init(keys[2], latents, jnp.ones((1,)), text, given, method="embed")
    tokens = wan.apply(variables, latents, jnp.ones((1,)), text, given, method="embed")
    connector = CanvasConnector(CanvasConnectorConfig(64, dit_block=False))
    canvas = jax.random.normal(keys[3], (1, 3, 2, 4, 64))
    added = connector.apply({"params": {}}, tokens, canvas, method="add")
    assert tokens.reference.shape == (1, 2 * LATENT[0] * LATENT[1] // 4, 64)
    np.testing.assert_array_equal(added.reference, tokens.reference)
    np.testing.assert_allclose(added.grid, tokens.grid + canvas, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "painting"}, "unknown task 'painting'"),
        ({"frames": 5}, "text_to_image makes one image"),
        ({"task": "text_to_video"}, "text_to_video makes one video"),
        ({"references": 1}, "text_to_image has 1 references"),
        ({"weight": -1.0}, "must be positive"),
    ],
)
def test_impossible_buckets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Bucket(**({"task": "text_to_image", "size": (8, 8)} | change))


def test_the_empty_prompt_of_a_dit_s_own_encoder_goes_without_instruction():
    tokenizer = train_tokenizer(["paint it", "a cat"])
    rows = TextRows(tokenizer, 6, instruction="paint it ")
    instructed, empty = rows("A cat"), rows("")
    assert instructed["text_tokens"].shape == empty["text_tokens"].shape
    assert empty["text_mask"].tolist() == [True] + [False] * (len(empty["text_mask"]) - 1)
    plain = TextRows(tokenizer, 6, instruction="")("")
    states, mask = jnp.asarray(empty["text_tokens"], jnp.float32)[None, :, None], jnp.asarray(empty["text_mask"])[None]
    kept = first_and_last(States(states, mask), 6)
    np.testing.assert_array_equal(kept.states[0, :, 0], plain["text_tokens"].astype(np.float32))
    np.testing.assert_array_equal(kept.mask[0], plain["text_mask"])
    silent = TextRows(tokenizer, 6, instruction="paint it ", reads_prompt=False)
    np.testing.assert_array_equal(silent("a cat")["text_tokens"], plain["text_tokens"])
