"""Whole pictures of tiny FLUX.2 [klein] folders against diffusers: prompts, schedule, guidance, references, pixels."""

import jax
import numpy as np
import pytest
from PIL import Image
from published_support import FLUX2_VAE, QWEN3, klein_pipeline, picture

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.paint import requests, runs
from metacanvas_jax.paint.requests import Request

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

QUICK = True
LENGTH = 96  # of prompts: the tokenizer makes about one token of a letter
ROWS, COLUMNS = 64, 96  # diffusers takes no smaller references
FLOAT32 = (
    *("dit.dtype=float32", "vae.dtype=float32", "text.encoder.dtype=float32", "train.frozen_dtype=float32"),
    f"text.length={LENGTH}",
    f"buckets=({{'task': 'text_to_image', 'size': ({ROWS}, {COLUMNS}), 'length': {LENGTH}}},)",
)


def saved(folder, distilled):
    """The pipeline, and its folder as `metacanvas sample --config configs/published.py:FOLDER` loads it, in float32."""
    pipeline = klein_pipeline(distilled)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    config = load_config(f"configs/published.py:{folder}", [f"--config.{change}" for change in FLOAT32])
    return pipeline, experiment(config)


def noise(count, seed):
    """The noise that ``Painter.paint`` draws for a seed, ``[b c h w]``."""
    shape = (count, 1, ROWS // 16, COLUMNS // 16, FLUX2_VAE.latent_channels)
    values = np.array(jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape))
    return torch.from_numpy(values[:, 0].transpose(0, 3, 1, 2).copy())


def same(ours, theirs):
    """Within one level of 255 in every pixel, and no blank."""
    theirs = np.stack([np.asarray(image) for image in theirs])
    assert ours.shape == theirs.shape and theirs.std() > 10
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def asked(pipeline, **given):
    return pipeline(
        **given,
        height=ROWS,
        width=COLUMNS,
        num_inference_steps=3,
        max_sequence_length=LENGTH,
        text_encoder_out_layers=QWEN3.states,
    ).images


def test_words_become_the_picture_of_the_base_pipeline_with_guidance(tmp_path):
    pipeline, setup = saved(tmp_path, distilled=False)
    assert (setup.sampler.steps, setup.sampler.guidance, setup.sampler.schedule) == (50, 4.0, "flux2_empirical")
    prompts = ["A red cat", "a blue house, painted"]
    expected = asked(pipeline, prompt=prompts, guidance_scale=4.0, latents=noise(2, 3))
    trained = runs.assembled(setup)
    samples, (shape, *_) = zip(*[requests.sample_of(trained.setup, Request(prompt)) for prompt in prompts], strict=True)
    same(trained.paint(samples, shape, seed=3, steps=3).pixels[:, 0], expected)


def test_an_edit_is_the_picture_of_the_distilled_pipeline(tmp_path):
    pipeline, setup = saved(tmp_path, distilled=True)
    assert (setup.sampler.steps, setup.sampler.guidance) == (4, 1.0)
    source = picture(ROWS, COLUMNS)
    expected = asked(pipeline, image=[Image.fromarray(source)], prompt="make it red", latents=noise(1, 3))
    trained = runs.assembled(setup)
    sample, shape = requests.sample_of(trained.setup, Request("make it red", image=source, edit=True))
    same(trained.paint([sample], shape, seed=3, steps=3).pixels[:, 0], expected)
