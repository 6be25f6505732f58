"""The output of transformers' processor, as inputs of the network here.

The full processor needs torchvision, so its output is put together from its parts: the image processor, the patches of
a video in its layout, and the tokenizer on text whose placeholders are repeated, one for each merged token.
"""

import math

import jax
import numpy as np
import pytest
from qwen_support import MEDIA, TINY, random_media, tokenizer
from test_qwen_prompt import TEMPLATE, picture

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import read_image
from metacanvas_jax.mllm.processor import processed_inputs
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter

MARKS = "<|vision_start|>{}<|vision_end|>"
IMAGES = [picture(60, 90), picture(112, 84, seed=1), picture(60, 90, seed=2)]
VIDEOS = [random_media((3, 4, 8), seconds=1.0, seed=3), random_media((2, 4, 4), seconds=0.8, seed=4)]


def block(token, grid):
    return MARKS.format(token * (math.prod(map(int, grid)) // MEDIA.merge**2))


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def outputs(words, grids, values, left=False):
    """What the processor returns for the three prompts of ``parts``."""
    seen = [block("<|image_pad|>", grid) for grid in grids]
    shown = [block("<|video_pad|>", video.grid) for video in VIDEOS]
    texts = [f"A {seen[0]}{seen[1]} and {shown[0]}so", "A red cat", f"{shown[1]}What is in {seen[2]}this picture?"]
    rows = [words.encode(TEMPLATE.format(text)) for text in texts]
    longest = max(map(len, rows))
    pad = words.convert_tokens_to_ids("<|endoftext|>")
    padded = [[pad] * (longest - len(row)) + row if left else row + [pad] * (longest - len(row)) for row in rows]
    masks = [[1] * len(row) for row in rows]
    masks = [[0] * (longest - len(m)) + m if left else m + [0] * (longest - len(m)) for m in masks]
    return {
        "input_ids": padded,
        "attention_mask": masks,
        "pixel_values": values,
        "image_grid_thw": grids,
        "pixel_values_videos": np.concatenate([video.values for video in VIDEOS]),
        "video_grid_thw": [video.grid for video in VIDEOS],
        "second_per_grid_ts": [video.seconds for video in VIDEOS],
    }


def ours(prompter):
    """The same prompts by our own reading."""
    images = [read_image(image, prompter.config.media) for image in IMAGES]
    parts = [
        ["A ", images[0], images[1], " and ", VIDEOS[0], "so"],
        ["A red cat"],
        [VIDEOS[1], "What is in ", images[2], "this picture?"],
    ]
    return prompter.batch([prompter(each) for each in parts])


def by_hand(words, **options):
    """The processor's output with the patches of our own reading."""
    images = [read_image(image, MEDIA) for image in IMAGES]
    values = np.concatenate([image.values for image in images])
    return outputs(words, [image.grid for image in images], values, **options)


def assert_same(got, expected, atol=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("rule", ["published", "transformers5"])
def test_processed_inputs_are_those_of_the_prompter(words, left, rule):
    prompter = Prompter(words, PromptConfig(rule=rule))
    assert_same(processed_inputs(by_hand(words, left=left), prompter), ours(prompter))


@pytest.mark.torch
def test_processed_inputs_take_the_tensors_of_transformers_and_have_its_positions(words):
    torch, support = pytest.importorskip("torch"), pytest.importorskip("qwen_torch_support")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = MEDIA.image_pixels
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})(
        IMAGES, return_tensors="pt"
    )
    processed = outputs(words, images["image_grid_thw"], images["pixel_values"])
    processed = {key: torch.as_tensor(value) for key, value in processed.items()}
    prompter = Prompter(words, PromptConfig(rule="transformers5"))
    inputs = processed_inputs(processed, prompter, length=processed["input_ids"].shape[1])
    assert_same(processed_inputs(processed, prompter), ours(prompter), atol=2e-6)

    ids = processed["input_ids"]
    kinds = (ids == support.IMAGE).int() + 2 * (ids == support.VIDEO).int()
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, _ = support.build(TINY).model.get_rope_index(ids, kinds, **{name: processed[name] for name in names})
    real = np.asarray(processed["attention_mask"], bool)
    np.testing.assert_array_equal(inputs.positions[:, real], positions.numpy()[:, real])


WRONG = {
    "too few media": ({"image_grid_thw": [(1, 4, 6)] * 2}, "more placeholders <.image_pad.> than there are media"),
    "too many media": ({"image_grid_thw": [(1, 4, 6)] * 9}, "media have no placeholder <.image_pad.>"),
    "another grid": ({"image_grid_thw": [(1, 4, 8)] * 3}, "a medium of grid .* needs 8 placeholders"),
    "other patches": ({"pixel_values": np.zeros((5, MEDIA.values))}, r"pixel_values is \[5, 1176\], expected"),
    "another number of times": ({"second_per_grid_ts": [1.0]}, "second_per_grid_ts holds 1 numbers for 2 videos"),
}


@pytest.mark.parametrize("case", WRONG)
def test_media_that_do_not_fit_their_placeholders_are_refused(words, case):
    changes, message = WRONG[case]
    processed = by_hand(words) | changes
    if case != "other patches":
        grids = processed["image_grid_thw"]
        processed["pixel_values"] = np.zeros((sum(int(np.prod(grid)) for grid in grids), MEDIA.values))
    with pytest.raises(UserError, match=message):
        processed_inputs(processed, Prompter(words, PromptConfig()))
