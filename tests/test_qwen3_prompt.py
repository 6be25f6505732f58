"""Prompts with timestamps: every temporal patch of a video is a block of its own. Against transformers' Qwen3-VL.

Its whole processor needs torchvision, so the methods that write the text and choose the sizes are called one by one.
"""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from qwen3_support import LANGUAGE
from qwen_support import tokenizer
from test_qwen_prompt import picture

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.canvas import CanvasConfig, canvas_positions
from metacanvas_jax.mllm.decoder import rope_angles
from metacanvas_jax.mllm.media import MediaConfig, Patches, read_image, read_video, target_size
from metacanvas_jax.mllm.positions import MediaBlock, sequence_positions
from metacanvas_jax.mllm.processor import processed_prompts
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen3_vl.network import Qwen3VL, qwen3_vl_4b
from metacanvas_jax.mllm.qwen3_vl.record import MEDIA as PUBLISHED

MEDIA = MediaConfig(**PUBLISHED | {"image_pixels": (4096, 9216), "video_pixels": (4096, 32768)})
FRAMES = [picture(60, 90, seed=seed) for seed in range(5)]
FPS = 1.7
BODY = "<|im_start|>user\n{}<|im_end|>"


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def prompter(words):
    return Prompter(words, PromptConfig(system=None, buckets=(192,), media=MEDIA))


def reference():
    return pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor


def said_by_the_reference(grid, count, fps):
    """What transformers puts in the place of a video of ``count`` frames."""
    processor = reference()
    known = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=functools.partial(processor._calculate_timestamps, None),
    )
    about = SimpleNamespace(fps=fps, frames_indices=list(range(count)))
    seen = {"video_grid_thw": np.array([grid]), "video_metadata": [about]}
    return processor.replace_video_token(known, seen, 0)


def test_qwen3_prompt_puts_each_temporal_patch_after_its_time(words, prompter):
    video, image = read_video(FRAMES, FPS, MEDIA), read_image(picture(90, 60), MEDIA)
    t, h, w = video.grid
    assert t == 3 and h * w > 4
    prompt = prompter(["A red ", image, "cat", video, " and so"])
    shown = f"<|vision_start|>{'<|image_pad|>' * (image.grid[1] * image.grid[2] // 4)}<|vision_end|>"
    expected = words.encode(BODY.format(f"A red {shown}cat{said_by_the_reference(video.grid, 5, FPS)} and so"))
    assert prompt.tokens.tolist() == expected

    pads = [np.flatnonzero(prompt.tokens == prompter.ids[name]) for name in ("<|image_pad|>", "<|video_pad|>")]
    for (_, places), own in zip(prompt.media, pads, strict=True):
        np.testing.assert_array_equal(places, own)
    blocks = [(pads[0][0], (1, *(side // 2 for side in image.grid[1:])))]
    blocks += [(start, (1, h // 2, w // 2)) for start in pads[1][:: h * w // 4]]
    parts, at = [], 0
    for start, grid in blocks:
        parts += [int(start) - at, MediaBlock(grid)]
        at = int(start) + grid[1] * grid[2]
    for rule in ("published", "transformers5"):
        np.testing.assert_array_equal(prompt.positions, sequence_positions([*parts, len(expected) - at], rule))


@pytest.mark.parametrize("count, fps", [(2, 2.0), (3, 1.0), (8, 0.3), (9, 24.0)])
def test_qwen3_times_are_those_of_the_middle_of_two_frames(count, fps):
    video = read_video([picture(64, 64)] * count, fps, MEDIA)
    assert list(video.times) == reference()._calculate_timestamps(None, list(range(count)), fps, 2)


def test_qwen3_processed_prompts_are_those_of_the_prompter(words, prompter):
    video, image = read_video(FRAMES, FPS, MEDIA), read_image(picture(90, 60), MEDIA)
    ours = prompter([video, "What is in ", image, "this picture?"])
    processed = {
        "input_ids": ours.tokens.tolist(),
        "pixel_values": image.values,
        "image_grid_thw": [image.grid],
        "pixel_values_videos": video.values,
        "video_grid_thw": [video.grid],
    }
    (prompt,) = processed_prompts(processed, prompter)
    np.testing.assert_array_equal(prompt.positions, ours.positions)
    for (patches, places), (own, expected) in zip(prompt.media, ours.media, strict=True):
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_array_equal(patches.values, own.values)
    last = int(np.flatnonzero(ours.tokens == prompter.ids["<|video_pad|>"])[-1])
    processed["input_ids"] = np.delete(ours.tokens, last).tolist()
    with pytest.raises(UserError, match=r"needs 6 placeholders <\|video_pad\|>"):
        processed_prompts(processed, prompter)


def test_qwen3_video_without_times_is_refused(prompter):
    video = read_video(FRAMES, FPS, MEDIA)
    with pytest.raises(ValueError, match="3 temporal patches has 0 times"):
        prompter([Patches(video.values, video.grid, video.seconds), "so"])


@pytest.mark.torch
@pytest.mark.parametrize("frames", [2, 3, 5, 31, 768])
@pytest.mark.parametrize("sides", [(480, 832), (20, 50), (1080, 1920), (64, 64), (33, 2000)])
def test_qwen3_frames_have_the_sizes_of_transformers(frames, sides):
    torch_side = pytest.importorskip("metacanvas_jax.mllm.torch_side")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    config = MediaConfig(**PUBLISHED)
    limits = dict(zip(("min_pixels", "max_pixels"), config.video_pixels, strict=True))
    expected = smart_resize(frames, *sides, temporal_factor=2, factor=32, **limits)
    assert target_size(*sides, config, frames=frames) == expected
    assert torch_side.target_size(*sides, dataclasses.asdict(config), frames) == expected


@pytest.mark.torch
def test_qwen3_exported_prompts_have_the_same_tokens_positions_and_patches(words, prompter):
    torch_side = pytest.importorskip("metacanvas_jax.mllm.torch_side")
    video, image = read_video(FRAMES, FPS, MEDIA), read_image(picture(90, 60), MEDIA)
    ours = prompter.batch([prompter([image, video, "a red cat"]), prompter("painted")])
    media = dataclasses.asdict(MEDIA)
    config = {"system": None, "length": 192, "tokens_per_second": 2.0, "media": media}
    seen = [torch_side.read_medium([picture(90, 60)], media), torch_side.read_medium(FRAMES, media, FPS)]
    theirs = torch_side.build(words, [(seen, "a red cat"), ([], "painted")], config)
    np.testing.assert_array_equal(theirs.tokens.numpy(), ours.tokens)
    np.testing.assert_array_equal(theirs.positions.numpy(), ours.positions)
    for patches, grid, (rows, columns) in theirs.media:
        (medium,) = (m for m in ours.media if m.grid == tuple(grid[0].tolist()))
        np.testing.assert_allclose(patches.numpy(), medium.patches[0, 0], atol=1e-6)
        np.testing.assert_array_equal(columns.numpy(), medium.slots[0, 0])
        assert not rows.any()


@pytest.mark.torch
def test_qwen3_image_patches_equal_those_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    low, high = MEDIA.image_pixels
    sizes = {"size": {"shortest_edge": low, "longest_edge": high}, "patch_size": 16}
    theirs = Qwen2VLImageProcessorPil(**sizes, image_mean=MEDIA.mean, image_std=MEDIA.std)(picture(90, 60))
    ours = read_image(picture(90, 60), MEDIA)
    assert list(ours.grid) == np.asarray(theirs["image_grid_thw"])[0].tolist()
    np.testing.assert_allclose(ours.values, np.asarray(theirs["pixel_values"]), atol=2e-6)


@pytest.mark.parametrize("sides", [(2, 3), (4, 2)])
def test_canvas_positions_of_keyframes_apart_are_those_of_blocks_one_after_the_other(sides):
    config = CanvasConfig(keyframes=3, rows=sides[0], columns=sides[1])
    got = canvas_positions(jnp.asarray([9, 4], jnp.int32), config.shape, config, frames_apart=True)
    for sample, start in enumerate((9, 4)):
        expected = sequence_positions([start, *[MediaBlock((1, *sides))] * 3])[:, start:]
        np.testing.assert_array_equal(got[:, sample], expected)
    for flat, grid in ((1, (1, 1, 3 * sides[0] * sides[1])), (2, (1, 3 * sides[0], sides[1]))):
        one = dataclasses.replace(config, dims=flat)
        got = canvas_positions(jnp.asarray([9], jnp.int32), config.shape, one, frames_apart=True)
        np.testing.assert_array_equal(got[:, 0] - 9, np.indices(grid).reshape(3, -1))


def test_qwen3_example_drawn_in_the_documentation_is_what_the_code_does():
    group = MediaBlock((1, 2, 2))
    prefix = sequence_positions([3, MediaBlock((1, 2, 3)), 2, group, 2, group, 2])
    config = CanvasConfig(keyframes=3, rows=2, columns=2)
    start = jnp.asarray([prefix.max() + 1], jnp.int32)
    canvas = canvas_positions(start, config.shape, config, frames_apart=Qwen3VL.frames_apart)[:, 0]
    page = (Path(__file__).parents[1] / "docs" / "mllm.md").read_text().splitlines()
    for name, row in zip("thw", np.concatenate([prefix, canvas], axis=1), strict=True):
        groups = np.split(row, [3, 9, 11, 15, 17, 21, 23])
        assert f"{name}  " + " | ".join(" ".join(f"{v:2d}" for v in group) for group in groups) in page


def test_qwen3_frequencies_turn_with_each_axis_in_turn():
    angles = rope_angles(jnp.asarray([[[1]], [[10]], [[100]]], jnp.int32), LANGUAGE)
    axes = np.array([1, 10, 100, 1, 10, 100, 1, 10, 100, 1, 1, 1])
    np.testing.assert_allclose(angles[0, 0], axes * LANGUAGE.rope_theta ** (-np.arange(12) / 12), rtol=1e-6)
    published = np.bincount(qwen3_vl_4b().language.rope_axes())
    assert published.tolist() == [24, 20, 20]


@pytest.mark.torch
@pytest.mark.parametrize("frames_apart", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exported_canvas_has_the_same_positions(dims, frames_apart):
    torch = pytest.importorskip("torch")
    from metacanvas_jax.mllm import torch_side

    config = CanvasConfig(keyframes=3, rows=2, columns=4, dims=dims, spacing=1.5)
    start = np.array([9, 4], np.int32)
    ours = canvas_positions(jnp.asarray(start), config.shape, config, frames_apart=frames_apart)
    theirs = torch_side.canvas_positions(
        torch.from_numpy(start), config.shape, dataclasses.asdict(config), frames_apart
    )
    np.testing.assert_array_equal(theirs.numpy(), ours)
