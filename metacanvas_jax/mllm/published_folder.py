"""What the published folders of the vision-language models have in common."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacanvas_jax.mllm.media import MediaConfig
from metacanvas_jax.mllm.vision_language import compared_sizes, example
from metacanvas_jax.weights.published import Fields, read_json
from metacanvas_jax.weights.record import Network

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
BICUBIC = 3  # Pillow's number


def check_processors(folder: Path, config: Any, media: Mapping[str, Any]) -> None:
    """Raises UserError where a folder says that its images are read in another way than ``mllm/media.py`` reads them.

    A folder need not say how. Limits of pixels are not compared: ``mllm.image_pixels`` of a config chooses its own.
    """
    ours, vision = MediaConfig(**media), config.vision
    for name in PROCESSORS if vision is not None else ():
        if (folder / name).exists():
            f = Fields(folder / name, read_json(folder / name))
            f.only(image_mean=list(ours.mean), image_std=list(ours.std), rescale_factor=1 / 255, resample=BICUBIC)
            f.only(patch_size=vision.patch, temporal_patch_size=vision.temporal_patch, merge_size=vision.merge)
            f.only(do_resize=True, do_rescale=True, do_normalize=True)


record = functools.partial(
    Network,
    family="mllm",
    arguments=example,
    ignore=lambda config: () if config.vision is not None else ("visual.*", "model.visual.*"),
    subfolder="text_encoder",
    free=("dtype", "remat", "unroll", "lora"),
    sizes=compared_sizes,
    beside=check_processors,
)
"""``Network`` of such a model."""


def outer_values(architecture: str, kind: str, tied: bool, tokens: dict[str, int]) -> dict[str, Any]:
    """The first keys of ``config.json``; ``tokens`` are the ids of the special tokens by their text."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        "tie_word_embeddings": tied,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
    }


def text_values(kind: str, language: Any, tokens: dict[str, int], **rope: Any) -> dict[str, Any]:
    """The keys of ``text_config``; ``rope`` are further ones of its ``rope_parameters``."""
    return {
        "model_type": kind,
        "vocab_size": language.vocab,
        "hidden_size": language.width,
        "intermediate_size": language.mlp,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": language.norm_eps,
        "bos_token_id": tokens["<|im_start|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": language.rope_theta,
            "mrope_section": list(language.rope_sections),
            **rope,
        },
    }


def vision_values(kind: str, vision: Any, activation: str) -> dict[str, Any]:
    """The keys of ``vision_config``."""
    return {
        "model_type": kind,
        "depth": vision.depth,
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "num_heads": vision.heads,
        "out_hidden_size": vision.out_width,
        "in_channels": vision.in_channels,
        "patch_size": vision.patch,
        "temporal_patch_size": vision.temporal_patch,
        "spatial_merge_size": vision.merge,
        "hidden_act": activation,
    }
