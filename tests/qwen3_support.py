"""Tiny Qwen3-VL networks and media for the tests, and transformers' network of the same sizes."""

import dataclasses

import numpy as np
from qwen_support import SPECIAL, tokenizer

from metacanvas_jax.mllm.media import MediaConfig, Patches
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen3_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen3_vl.record import MEDIA as PUBLISHED
from metacanvas_jax.mllm.qwen3_vl.vision import VisionConfig

LANGUAGE = LanguageConfig(
    vocab=300, width=64, layers=4, heads=4, kv_heads=2, mlp=112, rope_sections=(6, 3, 3), head_width=24
)
VISION = VisionConfig(depth=4, width=32, heads=2, mlp=52, out_width=64, deepstack_layers=(0, 2), position_side=6)
TINY = MllmConfig(LANGUAGE, VISION)
MEDIA = MediaConfig(**PUBLISHED)


def prompter(**options) -> Prompter:
    """A maker of prompts with timestamps."""
    return Prompter(tokenizer(), PromptConfig(system=None, media=MEDIA, **options))


def medium(grid: tuple[int, int, int], *, video: bool = False, seed: int = 0) -> Patches:
    """Random patches of a grid; the temporal patches of a video are 0.9 seconds apart."""
    values = np.random.default_rng(seed).standard_normal((int(np.prod(grid)), MEDIA.values), np.float32)
    if not video:
        return Patches(values, grid)
    return Patches(values, grid, 0.9, tuple(0.225 + 0.9 * k for k in range(grid[0])))


def build(config: MllmConfig):
    """transformers' model with the sizes of ``config``."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from metacanvas_jax.mllm.qwen3_vl.published import write

    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
    values = write(config, ids)
    values.pop("architectures")
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**values))


def reference_model(*, tied: bool = False):
    """transformers' model with the sizes of ``TINY`` and random weights."""
    from torch_support import randomize

    return randomize(build(MllmConfig(dataclasses.replace(LANGUAGE, tied=tied), VISION)))
