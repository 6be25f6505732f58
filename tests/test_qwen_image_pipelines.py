"""Whole pictures of tiny Qwen-Image folders against diffusers: prompts, schedule, guidance, references, pixels."""

import jax
import numpy as np
import pytest
from PIL import Image
from published_support import picture, qwen_image_pipeline

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.dit.qwen_image.prompts import PROMPTS
from metacanvas_jax.errors import UserError
from metacanvas_jax.paint import requests, runs
from metacanvas_jax.paint.requests import Request

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

LENGTH = 384  # of prompts: the tokenizer makes about one token of a letter
ROWS, COLUMNS = 32, 64
FLOAT32 = (
    *("dit.dtype=float32", "vae.dtype=float32", "train.frozen_dtype=float32", "mllm.language.dtype=float32"),
    *("mllm.vision.dtype=float32", "context_connector.dtype=float32", "canvas_connector.dtype=float32"),
    *("canvas.rows=2", "canvas.columns=2", f"mllm.buckets=({LENGTH},)"),
    f"buckets=({{'task': 'text_to_image', 'size': ({ROWS}, {COLUMNS}), 'length': {LENGTH}}},)",
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles without optimising: the networks are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assembled(folder, *changes):
    """The folder as `metacanvas sample --config configs/published.py:FOLDER` loads it, in float32."""
    overrides = [f"--config.{change}" for change in (*FLOAT32, *changes)]
    return runs.assembled(experiment(load_config(f"configs/published.py:{folder}", overrides)))


def packed_noise(count, seed):
    """The noise that ``Painter.paint`` draws for a seed, as the pipeline packs it: (row, column), (channel, cell)."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), (count, 1, ROWS // 8, COLUMNS // 8, 4))
    cut = np.array(noise).reshape(count, ROWS // 16, 2, COLUMNS // 16, 2, 4).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(cut.reshape(count, ROWS * COLUMNS // 256, 16))


def same(ours, theirs):
    """Within one level of 255 in every pixel, and no blank."""
    theirs = np.stack([np.asarray(image) for image in theirs])
    assert ours.shape == theirs.shape and theirs.std() > 10
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_words_become_the_picture_of_the_published_pipeline(tmp_path):
    pipeline = qwen_image_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["A red cat", "a blue house, painted"]
    expected = pipeline(
        prompts,
        negative_prompt=["", ""],
        true_cfg_scale=4.0,
        height=ROWS,
        width=COLUMNS,
        num_inference_steps=4,
        latents=packed_noise(2, 3),
    ).images
    trained = assembled(tmp_path)
    asked = [requests.sample_of(trained.setup, Request(prompt)) for prompt in prompts]
    samples, (shape, *_) = zip(*asked, strict=True)
    same(trained.paint(samples, shape, seed=3, steps=4, guidance=4.0).pixels[:, 0], expected)


class Processor:
    """Images and words as the published processor reads them, which needs torchvision in transformers 5."""

    def __init__(self, tokenizer):
        from transformers import Qwen2VLImageProcessor

        self.tokenizer, self.images = tokenizer, Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)

    def __call__(self, text, images, padding, return_tensors):
        seen = self.images(images=images, return_tensors=return_tensors)
        for grid in seen["image_grid_thw"]:
            text = [words.replace("<|image_pad|>", "<|empty|>" * int(grid.prod() // 4), 1) for words in text]
        text = [words.replace("<|empty|>", "<|image_pad|>") for words in text]
        return seen | self.tokenizer(text, padding=padding, return_tensors=return_tensors)


def test_an_edit_is_the_picture_of_the_published_pipeline(tmp_path, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module
    from transformers import BatchFeature

    for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"):
        monkeypatch.setattr(module, name, ROWS * COLUMNS)
    pipeline = qwen_image_pipeline(edit=True)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    read = Processor(pipeline.tokenizer)
    pipeline.processor = lambda **given: BatchFeature(dict(read(**given)))
    number, forward = pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>"), pipeline.text_encoder.forward
    # diffusers 0.42 leaves these types out, and transformers 5 would then number images like text.
    pipeline.text_encoder.forward = lambda input_ids, **given: forward(
        input_ids=input_ids, mm_token_type_ids=(input_ids == number).int(), **given
    )
    source = picture(ROWS, COLUMNS)
    expected = pipeline(
        image=[Image.fromarray(source)],
        prompt="make it red",
        negative_prompt="",
        true_cfg_scale=4.0,
        height=ROWS,
        width=COLUMNS,
        num_inference_steps=4,
        latents=packed_noise(1, 3),
    ).images
    trained = assembled(tmp_path, "mllm.image_tokens=6")
    sample, shape = requests.sample_of(trained.setup, Request("make it red", image=source, edit=True))
    same(trained.paint([sample], shape, seed=3, steps=4).pixels[:, 0], expected)


def test_a_folder_of_another_pipeline_is_refused_by_name(tmp_path):
    qwen_image_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"QwenImagePipeline"', '"QwenImageLayeredPipeline"'))
    with pytest.raises(UserError, match="QwenImageLayeredPipeline, expected QwenImagePipeline or QwenImageEditPipe"):
        load_config(f"configs/published.py:{tmp_path}", [])


def test_the_prompts_are_those_of_the_pipelines():
    import diffusers

    for name, prompt in PROMPTS.items():
        parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
        parts |= {} if name == "QwenImagePipeline" else {"processor": None}
        pipeline = getattr(diffusers, name)(**parts)
        assert pipeline.prompt_template_encode_start_idx == prompt.skip
        words = f"<|im_start|>system\n{prompt.system}<|im_end|>\n<|im_start|>user\n"
        assert pipeline.prompt_template_encode.startswith(words)
        assert pipeline.prompt_template_encode.endswith("{}<|im_end|>\n<|im_start|>assistant\n")
