"""Positions of text, images, videos and canvases."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.mllm.canvas import CanvasConfig, canvas_positions
from metacanvas_jax.mllm.decoder import rope_angles
from metacanvas_jax.mllm.positions import MediaBlock, sequence_positions
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.vision_language import next_position

IMAGE, VIDEO = MediaBlock((1, 6, 10)), (5, 4, 6)


@pytest.mark.parametrize(
    "seconds, times, published, transformers5",
    [  # measured on transformers 5.23 and, for the published rule, worked out by hand
        (1.0, [17, 19, 21, 23, 25], 26, 23),
        (0.5, [17, 18, 19, 20, 21], 23, 23),
        (0.25, [17, 17, 18, 18, 19], 23, 23),
        (0.8, [17, 18, 20, 21, 23], 24, 23),
        (4.0, [17, 25, 33, 41, 49], 50, 23),
    ],
)
def test_positions_of_text_image_text_video_text(seconds, times, published, transformers5):
    parts = [3, IMAGE, 4, MediaBlock(VIDEO, 2 * seconds), 4]
    for rule, after in (("published", published), ("transformers5", transformers5)):
        positions = sequence_positions(parts, rule)
        assert positions.shape == (3, 3 + 60 + 4 + 120 + 4)
        image, text, video = positions[:, 3:63], positions[:, 63:67], positions[:, 67:187]
        assert (image[0] == 3).all() and image[1].max() == 8 and image[2].max() == 12
        assert text.tolist() == [[13, 14, 15, 16]] * 3
        assert video[0, ::24].tolist() == times
        assert video[1].min() == video[2].min() == 17 and video[1].max() == 20 and video[2].max() == 22
        assert positions[:, 187:].tolist() == [list(range(after, after + 4))] * 3


def test_unknown_position_rule_is_refused():
    with pytest.raises(ValueError, match="unknown position rule 'newest'"):
        sequence_positions([1], "newest")


def test_next_position_is_one_after_the_largest_of_any_axis_and_ignores_padding():
    video = sequence_positions([3, MediaBlock((5, 2, 2), 8.0)])  # time runs to 3 + 32
    text = sequence_positions([4])
    positions = np.full((3, 2, 30), 999, np.int32)
    mask = np.zeros((2, 30), bool)
    positions[:, 0, :23], mask[0, :23] = video, True  # right padding
    positions[:, 1, -4:], mask[1, -4:] = text, True  # left padding
    assert next_position(jnp.asarray(positions), jnp.asarray(mask)).tolist() == [36, 4]


def test_canvas_positions_of_one_keyframe_are_those_of_an_image():
    got = canvas_positions(jnp.asarray([0, 7], jnp.int32), (1, 6, 10), CanvasConfig(rows=6, columns=10))
    for sample, start in enumerate((0, 7)):
        np.testing.assert_array_equal(got[:, sample], sequence_positions([start, IMAGE])[:, start:])


@pytest.mark.parametrize("spacing", [0.0, 0.5, 1.0, 2.0, 5.04])
def test_canvas_positions_of_keyframes_are_those_of_a_video(spacing):
    config = CanvasConfig(keyframes=5, rows=4, columns=6, spacing=spacing)
    got = canvas_positions(jnp.asarray([9], jnp.int32), config.shape, config)
    np.testing.assert_array_equal(got[:, 0], sequence_positions([9, MediaBlock(VIDEO, spacing)])[:, 9:])


@pytest.mark.parametrize("dims, grid", [(1, (1, 1, 12)), (2, (1, 6, 2)), (3, (3, 2, 2))])
def test_canvas_positions_of_fewer_axes(dims, grid):
    config = CanvasConfig(keyframes=3, rows=2, columns=2, dims=dims, spacing=1.0)
    got = canvas_positions(jnp.asarray([5], jnp.int32), config.shape, config)
    np.testing.assert_array_equal(got[:, 0] - 5, np.indices(grid).reshape(3, -1))


def test_canvas_positions_without_rope_are_those_of_text():
    config = CanvasConfig(rows=2, columns=3, rope=False)
    got = canvas_positions(jnp.asarray([5], jnp.int32), config.shape, config)
    assert got[:, 0].tolist() == [list(range(5, 11))] * 3


def test_mrope_turns_contiguous_sections_with_time_height_and_width():
    config = LanguageConfig(
        vocab=8, width=16, layers=1, heads=1, kv_heads=1, mlp=8, rope_sections=(2, 3, 3), rope_theta=100.0
    )
    angles = rope_angles(jnp.asarray([[[1]], [[10]], [[100]]], jnp.int32), config)
    expected = np.array([1, 1, 10, 10, 10, 100, 100, 100]) * 100.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(angles[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_sections": (2, 3, 4)}, "must sum to 8"),
        ({"kv_heads": 3, "heads": 4}, "not a multiple of kv_heads 3"),
        ({"heads": 3, "kv_heads": 3}, "width 16 is not a multiple of heads 3"),
    ],
)
def test_mrope_and_decoder_sizes_that_do_not_fit_are_refused(change, message):
    sizes = {"vocab": 8, "width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 8, "rope_sections": (2, 3, 3)}
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**(sizes | change))


def test_mrope_example_drawn_in_the_documentation_is_what_the_code_does():
    prefix = sequence_positions([3, MediaBlock((1, 2, 3)), 2, MediaBlock((2, 2, 2), 2.0), 2])
    config = CanvasConfig(keyframes=3, rows=2, columns=2, spacing=2.0)
    canvas = canvas_positions(jnp.asarray([prefix.max() + 1], jnp.int32), config.shape, config)[:, 0]
    page = (Path(__file__).parents[1] / "docs" / "mllm.md").read_text().splitlines()
    for name, row in zip("thw", np.concatenate([prefix, canvas], axis=1), strict=True):
        groups = np.split(row, [3, 9, 11, 19, 21])
        assert f"{name}  " + " | ".join(" ".join(f"{v:2d}" for v in group) for group in groups) in page
