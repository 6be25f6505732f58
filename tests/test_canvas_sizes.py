"""The size of a canvas: fixed, or following the latents, by one rule in training, drawing and evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments_support import batch, miniature, shapes_of_a_step

from metacanvas_jax import metacanvas
from metacanvas_jax.config.check import check
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import flow_loss
from metacanvas_jax.mllm.canvas import CanvasConfig, CanvasTokens
from metacanvas_jax.nn.resize import linear_weights
from metacanvas_jax.paint.program import how_to, program
from metacanvas_jax.sizes import canvas_grid
from metacanvas_jax.train.parameters import param_shapes

WIDE = (60, 120)  # pixels; 10 x 20 latents of the miniature


@pytest.fixture(scope="module")
def setup() -> Experiment:
    """An edit of 2:1 by FLUX in miniature; a cell of the canvas covers 4 x 4 latents, its embeddings are 5 x 5."""
    setup = miniature("image_editing", "canvas")
    bucket = dataclasses.replace(setup.shapes[0], size=WIDE)
    canvas = dataclasses.replace(setup.canvas, latents_per_cell=4)
    return dataclasses.replace(setup, canvas=canvas, buckets=(bucket,))


@pytest.fixture
def written(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all canvases that the MLLM is given to write, as programs are traced."""
    shapes, write = [], metacanvas.write_canvas

    def seen(mllm, tokens, *rest, **options):
        shapes.append(tokens.shape[:3])
        return write(mllm, tokens, *rest, **options)

    monkeypatch.setattr(metacanvas, "write_canvas", seen)
    return shapes


@pytest.mark.parametrize(
    ("latents", "per_cell", "expected"),
    [
        ((31, 44, 80), None, (3, 11, 20)),
        ((1, 44, 80), None, (1, 11, 20)),
        ((2, 88, 8), None, (2, 11, 20)),
        ((1, 128, 128), 4, (1, 32, 32)),
        ((1, 64, 128), 4, (1, 16, 32)),
        ((31, 44, 80), 4, (3, 11, 20)),
        ((1, 6, 5), 4, (1, 2, 1)),  # 1.5 and 1.25
        ((1, 1, 9), 8, (1, 1, 1)),
        ((1, 7, 9), 1, (1, 7, 9)),
    ],
)
def test_a_canvas_follows_the_latents_by_its_ratio_and_has_no_more_keyframes_than_frames(latents, per_cell, expected):
    assert canvas_grid((3, 11, 20), latents, per_cell) == expected
    assert CanvasConfig(11, 20, 3, latents_per_cell=per_cell).shape_for(latents) == expected


def test_a_canvas_of_another_size_interpolates_the_embeddings_over_the_whole_picture():
    tokens = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    canvas = CanvasTokens(CanvasConfig(4, 4), 3).apply({"params": {"tokens": jnp.asarray(tokens)}}, (1, 2, 6))
    expected = np.einsum("Yy,Xx,kyxd->kYXd", linear_weights(4, 2), linear_weights(4, 6), tokens)
    np.testing.assert_allclose(canvas, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(canvas[0, :, 0], (tokens[0, 0::2, 0] + tokens[0, 1::2, 0]) / 2, rtol=1e-5)


def test_the_parameters_do_not_depend_on_the_size_of_the_canvas(setup):
    fixed = dataclasses.replace(setup, canvas=dataclasses.replace(setup.canvas, latents_per_cell=None))
    assert jax.tree.map(jnp.shape, param_shapes(setup)) == jax.tree.map(jnp.shape, param_shapes(fixed))


def test_training_drawing_and_evaluation_write_a_canvas_of_the_same_size(setup, written):
    bucket = setup.shapes[0]
    shapes_of_a_step(setup, bucket)
    assert written.pop() == (1, 3, 5)  # the gradient is of the last one; init makes the embeddings' own size

    params, zeros, key = param_shapes(setup), batch(setup, bucket), jax.random.key(0)
    painted = jax.eval_shape(program(setup, how_to(setup, bucket)), params, zeros, mllm_inputs(zeros), key)
    assert painted.pixels.shape[1:4] == (1, *WIDE) and written.pop() == (1, 3, 5)

    prepare, loss = flow_loss._programs(setup, bucket)
    prepared = jax.eval_shape(prepare, params, zeros)
    places, level = jnp.arange(bucket.batch), jnp.float32(0.5)
    jax.eval_shape(lambda p, x: loss(p, x, places, key, level, places >= 0, canvas=True), params, prepared)
    assert written.pop() == (1, 3, 5)


def test_a_canvas_of_too_many_tokens_is_refused_before_anything_is_built(setup):
    large = dataclasses.replace(setup.shapes[0], size=(6000, 6000))
    canvas = dataclasses.replace(setup.canvas, latents_per_cell=2)
    with pytest.raises(UserError, match=r"a canvas of 250000 tokens .* \(canvas.latents_per_cell is 2\), at most 655"):
        check(dataclasses.replace(setup, canvas=canvas, buckets=(large,)))
