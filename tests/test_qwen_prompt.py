"""Prompts, media and batches on the host."""

import jax
import numpy as np
import pytest
from PIL import Image
from qwen_support import MEDIA, random_media, tokenizer

from metacanvas_jax.data.examples import shortened
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import (
    MediaConfig,
    patchify,
    read_image,
    read_video,
    resized,
    sample_frames,
    target_size,
)
from metacanvas_jax.mllm.positions import MediaBlock, sequence_positions
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter

TEMPLATE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>"


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    "text", ["A red cat", "", "  leading spaces", "\n\nleading newlines", "trailing\n\n", "naïve cafe\u0301 猫 🐈"]
)
def test_qwen_prompt_is_what_the_tokenizer_makes_of_the_whole_template(words, text):
    expected = words.encode(TEMPLATE.format(text))
    assert Prompter(words, PromptConfig())(text).tokens.tolist() == expected
    assert Prompter(words, PromptConfig()).texts(["other", text])[1].tokens.tolist() == expected


def test_qwen_prompt_opens_the_assistants_turn_when_asked(words):
    prompt = Prompter(words, PromptConfig(assistant=True))("A red cat")
    expected = TEMPLATE.format("A red cat") + "\n<|im_start|>assistant\n"
    assert prompt.tokens.tolist() == words.encode(expected)


def test_qwen_prompt_puts_media_between_texts(words):
    image, video = random_media((1, 4, 8)), random_media((3, 4, 4), seconds=1.0)
    prompt = Prompter(words, PromptConfig())(["A cat", image, video, " and"])
    body = "A cat<|vision_start|>{}<|vision_end|><|vision_start|>{}<|vision_end|> and"
    expected = words.encode(TEMPLATE.format(body.format("<|image_pad|>" * 8, "<|video_pad|>" * 12)))
    assert prompt.tokens.tolist() == expected
    pads = [expected.index(words.convert_tokens_to_ids(token)) for token in ("<|image_pad|>", "<|video_pad|>")]
    assert [places.tolist() for _, places in prompt.media] == [
        [*range(p, p + n)] for p, n in zip(pads, (8, 12), strict=True)
    ]
    parts = [pads[0], MediaBlock((1, 2, 4)), 2, MediaBlock((3, 2, 2), 2.0), len(expected) - pads[1] - 12]
    np.testing.assert_array_equal(prompt.positions, sequence_positions(parts))


def test_qwen_prompt_numbers_its_images_in_words(words):
    parts = [random_media((1, 4, 8)), random_media((1, 4, 4)), random_media((3, 4, 4), seconds=1.0), "A cat"]
    prompt = Prompter(words, PromptConfig(image_label="Picture {}: "))(parts)
    shown = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in (8, 4)]
    video = "<|vision_start|>" + "<|video_pad|>" * 12 + "<|vision_end|>"
    body = f"Picture 1: {shown[0]}Picture 2: {shown[1]}{video}A cat"
    assert prompt.tokens.tolist() == words.encode(TEMPLATE.format(body))
    starts = [int(places[0]) for _, places in prompt.media]
    assert [prompt.tokens[place - 1] for place in starts] == [words.convert_tokens_to_ids("<|vision_start|>")] * 3
    # Each medium starts at the position after the words before it.
    for (patches, _), place in zip(prompt.media, starts, strict=True):
        (grid,) = (block.grid for block in Prompter(words, PromptConfig()).blocks(patches))
        assert (prompt.positions[:, place] == prompt.positions[:, place - 1] + 1).all() and grid[0] >= 1


@pytest.mark.parametrize("pad_left", [False, True])
def test_qwen_batch_pads_to_a_bucket_and_says_where_media_go(words, pad_left):
    prompter = Prompter(words, PromptConfig(buckets=(32, 64, 128), pad_left=pad_left))
    image, other = random_media((1, 4, 8), seed=1), random_media((1, 4, 8), seed=2)
    prompts = [prompter("A red cat"), prompter(["A", image, "b", other]), prompter(["A", random_media((3, 4, 4))])]
    batch = prompter.batch(prompts)
    assert batch.tokens.shape == (3, 64)
    for i, prompt in enumerate(prompts):
        real = batch.mask[i]
        assert real.sum() == len(prompt.tokens) and real[-1 if pad_left else 0]
        np.testing.assert_array_equal(batch.tokens[i, real], prompt.tokens)
        np.testing.assert_array_equal(batch.positions[:, i, real], prompt.positions)
    two, video = batch.media
    assert (two.grid, two.patches.shape[:2], video.grid) == ((1, 4, 8), (3, 2), (3, 4, 4))
    pad = words.convert_tokens_to_ids("<|image_pad|>")
    assert (batch.tokens[1][two.slots[1]] == pad).all() and len(set(two.slots[1].ravel())) == 16
    np.testing.assert_array_equal(two.patches[1, 1], other.values)
    assert (two.slots[[0, 2]] == 64).all() and (video.slots[:2] == 64).all()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_qwen_batch_of_a_fixed_layout_has_its_shapes_whatever_the_prompts(words):
    prompter = Prompter(words, PromptConfig())
    layout = (((1, 4, 4), 1), ((1, 4, 8), 2))
    shapes = [
        jax.tree.map(np.shape, prompter.batch([prompter(parts)], length=64, layout=layout))
        for parts in (["A"], ["A", random_media((1, 4, 8))])
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(UserError, match=r"2 media of grid \(1, 4, 4\).*room for"):
        prompter.batch([prompter([random_media((1, 4, 4))] * 2)], length=64, layout=layout)


def test_qwen_prompt_too_long_for_the_buckets_is_refused(words):
    prompter = Prompter(words, PromptConfig(buckets=(8, 16)))
    prompt = prompter("A red cat beside a blue house")
    with pytest.raises(UserError, match=rf"{len(prompt.tokens)} tokens does not fit buckets \(8, 16\)"):
        prompter.batch([prompt])
    with pytest.raises(UserError, match="does not fit length 10"):
        prompter.batch([prompt], length=10)


def test_qwen_prompt_reads_special_tokens_of_a_text_as_plain_text(words):
    prompter = Prompter(words, PromptConfig())
    for token in prompter.ids:
        text = f"a cat {token} here"
        prompt = prompter([random_media((1, 4, 4)), text])
        plain = prompter.text(text)
        assert set(prompter.ids.values()).isdisjoint(plain.tolist())
        np.testing.assert_array_equal(prompt.tokens[-len(plain) - 1 : -1], plain)
        assert prompter.decode(plain) == text
        np.testing.assert_array_equal(prompter.texts([text])[0].tokens, prompter(text).tokens)
    special = prompter.ids["<|image_pad|>"]
    assert words("<|image_pad|>", add_special_tokens=False).input_ids == [special], "the tokenizer itself is unchanged"


def test_qwen_prompt_refuses_a_tokenizer_without_special_tokens(words):
    bare = type(words)(tokenizer_object=type(words.backend_tokenizer).from_str(_without(words, "<|video_pad|>")))
    with pytest.raises(UserError, match=r"no <\|video_pad\|>"):
        Prompter(bare, PromptConfig())


@pytest.mark.parametrize(
    "text", ["😀" * 300, "👨‍👩‍👧‍👦🏽" * 60, "e\u0301" * 300, "ก็" * 200, "a cat " * 99, "\n\t " * 99]
)
@pytest.mark.parametrize("length", [24, 31, 64])
def test_a_long_text_of_any_script_is_cut_between_characters(words, text, length):
    prompter = Prompter(words, PromptConfig(system=None))
    if len((whole := prompter(text)).tokens) <= length:
        return
    cut = shortened(prompter, whole, [], text, length)
    assert len(cut.tokens) <= length
    assert "\ufffd" not in prompter.decode(cut.tokens)
    assert prompter.cut(text, 0) == "" and prompter.cut(text, 10**6) == text
    assert all(text.strip().startswith(prompter.cut(text, count)) for count in range(1, 40))


def _without(words, token):
    return words.backend_tokenizer.to_str().replace(token, "<|something|>")


@pytest.mark.parametrize(
    "sides, expected",
    [((512, 512), (504, 504)), ((1024, 1024), (1036, 1036)), ((480, 832), (476, 840)), ((70, 70), (56, 56))],
)
def test_qwen_image_sides_are_rounded_half_to_even(sides, expected):
    assert resized(*sides, 28, MEDIA.image_pixels) == expected


@pytest.mark.parametrize("sides", [(512, 512), (480, 832), (1000, 100), (30, 40), (4000, 3000), (7, 700)])
def test_qwen_image_of_a_token_budget_uses_it_up_and_keeps_its_aspect(sides):
    height, width = target_size(*sides, MediaConfig(tokens=144))
    rows, columns = height // 28, width // 28
    assert 130 <= rows * columns <= 144
    if sides[0] == sides[1]:
        assert rows == columns == 12
    assert abs(np.log(rows / columns) - np.log(sides[0] / sides[1])) < max(0.1, abs(np.log(sides[0] / sides[1])) / 4)


@pytest.mark.torch
@pytest.mark.parametrize("sides", [(200, 300), (30, 50), (56, 84), (640, 400)])
def test_qwen_image_patches_equal_those_of_transformers(sides):
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = (56 * 56, 300 * 300)
    image = picture(*sides)
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})(image)
    ours = read_image(image, MediaConfig(image_pixels=limits))
    assert list(ours.grid) == np.asarray(theirs["image_grid_thw"])[0].tolist()
    np.testing.assert_allclose(ours.values, np.asarray(theirs["pixel_values"]), atol=2e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_qwen_image_patches_have_transparency_on_white(mode):
    cutout = Image.new("RGBA", (56, 56), (200, 30, 30, 255))
    cutout.paste((0, 0, 0, 0), (0, 0, 28, 56))
    white = np.asarray(cutout.convert(mode).convert("RGBA"))[..., :3].copy()
    white[:, :28] = 255
    np.testing.assert_array_equal(read_image(cutout.convert(mode), MEDIA).values, read_image(white, MEDIA).values)


@pytest.mark.torch
def test_qwen_image_patches_of_a_cutout_equal_those_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cutout = picture(56, 84).convert("RGBA")
    cutout.putalpha(Image.linear_gradient("L").resize(cutout.size))
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 300 * 300})(cutout)
    ours = read_image(cutout, MediaConfig(image_pixels=(56 * 56, 300 * 300)))
    # Half a step of a byte and a bit: the two round the mixed colours in their own ways.
    np.testing.assert_allclose(ours.values, np.asarray(theirs["pixel_values"]), atol=1.01 / 255 / min(MEDIA.std))


def test_qwen_image_of_sixteen_bits_is_refused():
    with pytest.raises(UserError, match="an image of mode I;16, expected 8 bits per channel"):
        read_image(Image.new("I;16", (56, 56), 40_000), MEDIA)


def test_qwen_video_patches_hold_two_frames_each_and_repeat_an_odd_last_one():
    frames = [np.full((28, 56, 3), value, np.uint8) for value in (0, 50, 100, 150, 200)]
    config = MediaConfig(video_pixels=(28 * 28, 56 * 56))
    video = read_video(frames, 2.0, config)
    assert (video.grid, video.seconds) == ((3, 2, 4), 1.0)
    values = video.values.reshape(3, 8, 3, 2, 14 * 14)
    pixels = values * np.array(config.std)[:, None, None] + np.array(config.mean)[:, None, None]
    np.testing.assert_allclose(pixels.mean(axis=(1, 2, 4)) * 255, [[0, 50], [100, 150], [200, 200]], atol=1e-3)


def test_qwen_patches_are_ordered_by_merge_block():
    rows, columns = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
    image = np.repeat(np.repeat(rows * 10 + columns, 14, 0), 14, 1)[None, ..., None].astype(np.float32)
    values, grid = patchify(np.repeat(image, 3, -1), MEDIA)
    assert grid == (1, 4, 6)
    assert values[:, 0].tolist()[:8] == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: read_image(picture(5, 2000), MEDIA), "5 x 2000 pixels"),
        (lambda: read_image(np.zeros((8, 8), np.uint8), MEDIA), r"not uint8 \[8, 8\]"),
        (lambda: read_video([picture(28, 28), picture(28, 56)], 2.0, MEDIA), "frames of one size"),
        (lambda: read_video([], 2.0, MEDIA), "frames of one size"),
        (lambda: read_video([picture(28, 28)], 0.0, MEDIA), "must be positive"),
        (lambda: sample_frames(1, 24.0), "too short"),
    ],
)
def test_qwen_media_that_cannot_be_read_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("count, fps", [(121, 24.0), (100, 25.0), (9, 30.0), (5000, 30.0), (3, 24.0)])
def test_qwen_video_frames_are_sampled_as_transformers_does(count, fps):
    chosen, effective = sample_frames(count, fps)
    number = len(chosen)
    assert number % 2 == 0 and 2 <= number <= 768 and chosen[0] == 0 and chosen[-1] < count
    assert effective == pytest.approx(number / (count / fps))
    expected = {121: 10, 100: 8, 9: 4, 5000: 332, 3: 2}[count]
    assert number == expected


@pytest.mark.slow
def test_qwen_text_prompts_are_built_fast_enough(words):
    import time

    prompter = Prompter(words, PromptConfig())
    texts = [f"A photo of {i} red cats beside a blue house, painted in oil." for i in range(4000)]
    start = time.process_time()
    prompter.batch(prompter.texts(texts))
    assert len(texts) / (time.process_time() - start) > 2000
