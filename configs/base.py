"""Defaults of every experiment, once. Other configs start from ``get_config`` and change what differs.

Sizes of published networks come from the presets of the networks themselves. A config file of an experiment has
variants, named after the colon, and each of them has a miniature: ``configs/t2i_scratch.py:metaquery``,
``configs/t2i_scratch.py:metaquery.miniature``; ``configs/t2i_scratch.py`` and ``configs/t2i_scratch.py:miniature`` are
those of the first variant. ``.emoji`` in place of ``.miniature`` is the same on other data.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from metacanvas_jax import registry
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import qwen2_5_vl_3b, qwen2_5_vl_7b
from metacanvas_jax.mllm.qwen3_vl.network import qwen3_vl_2b, qwen3_vl_4b, qwen3_vl_8b
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.worlds.scenes import SceneWorld

WEIGHTS = "weights"  # folder of the published weights, each under its name on Hugging Face
DATA = "data"  # folder of the data sets
MINIATURES = ("miniature", "emoji")  # the same networks, on drawn scenes and on the emoji of npm packages
LARGE = {"dtype": "bfloat16", "remat": "full"}  # how networks of published size are computed
# The same for a DiT of videos. The results of attention are kept, 5 GB for 121 frames, so that the backward pass does
# not repeat the forward attention.
VIDEO = {"dtype": "bfloat16", "remat": "attention"}


def section(defaults, **changes) -> ConfigDict:
    """A section of a config: all fields of a dataclass, or of its defaults where a class is given, and ``changes``.

    Of a class, fields without a default are None. Those of the connectors are derived when the config is read.
    """
    return ConfigDict(_fields(defaults) | changes)


def _fields(defaults) -> dict[str, Any]:
    """Fields by name. A number or a word that is None can be set on the command line."""
    values = {}
    for name, hint in get_type_hints(defaults if isinstance(defaults, type) else type(defaults)).items():
        value = getattr(defaults, name, None)
        kinds = [kind for kind in (hint, *get_args(hint)) if kind in (bool, int, float, str)]
        if dataclasses.is_dataclass(value):
            values[name] = _fields(value)
        elif value is None and kinds:
            values[name] = placeholder(kinds[0])
        else:
            values[name] = value
    return values


def get_config() -> ConfigDict:
    """The values that experiments share: AdamW as in the paper (section 3.1), rectified flow, EMA."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0
    config.objective = "paint"
    config.start = config.dit_weights = config.vae_weights = ""
    config.world = section(SceneWorld())
    config.data = section(schema.DataSection(path=""))
    config.optimizer = section(OptimizerConfig(learning_rate=1e-4, warmup_steps=300, warmup_from=1e-5))
    config.train = section(schema.TrainSection(steps=20_000, batch=320, rules=((".*", "train"),)))
    config.time = section(TimeConfig())
    config.sampler = section(schema.SamplerSection())
    config.eval = section(schema.EvalSection(evaluators=("flow_loss",)))
    config.mesh = section(MeshConfig())
    config.paths = section(schema.PathsSection())
    config.hardware = ()
    return config


def choose(file: str, variants: Sequence[str], asked: str) -> tuple[str, str]:
    """``VARIANT``, ``VARIANT.miniature`` or ``miniature`` to (variant, "" or the kind of miniature)."""
    words = asked.split(".") if asked else []
    small = [word for word in words if word in MINIATURES]
    named = [word for word in words if word not in MINIATURES]
    name = named[0] if named else variants[0]
    if name not in variants or len(named) > 1 or len(small) > 1:
        kinds = " or ".join(f"VARIANT.{kind}" for kind in MINIATURES)
        raise ValueError(f"{file} has the variants {', '.join(variants)}, each also as {kinds}, not {asked!r}")
    return name, small[0] if small else ""


def qwen(size: str, lora: LoraConfig | None = None) -> ConfigDict:
    """Qwen2.5-VL of size "3B" or "7B", 144 tokens per image (paper, Table 16)."""
    preset = {"3B": qwen2_5_vl_3b, "7B": qwen2_5_vl_7b}[size](lora=lora, **LARGE)
    return _reader(preset, f"{WEIGHTS}/Qwen2.5-VL-{size}-Instruct")


def qwen3(size: str, lora: LoraConfig | None = None) -> ConfigDict:
    """Qwen3-VL of size "2B", "4B" or "8B", 144 tokens per image. Its chat template has no system prompt by itself."""
    preset = {"2B": qwen3_vl_2b, "4B": qwen3_vl_4b, "8B": qwen3_vl_8b}[size](lora=lora, **LARGE)
    return _reader(preset, f"{WEIGHTS}/Qwen3-VL-{size}-Instruct")


def _reader(preset: Any, folder: str) -> ConfigDict:
    """The section of a published MLLM, with the number of tokens per image of the paper."""
    record = registry.of(preset)
    halves = {"weights": folder, "tokenizer": folder, "image_tokens": 144, "kind": record.name}
    return section(schema.MllmSection(preset.language, preset.vision, **halves, **record.settings))


def gemma() -> ConfigDict:
    """The text encoder of SANA, as published."""
    folder = f"{WEIGHTS}/Sana_1600M_512px_diffusers"
    encoder = Gemma2Config(dtype="bfloat16")
    return section(schema.TextSection(encoder, weights=f"{folder}/text_encoder", tokenizer=f"{folder}/tokenizer"))


def canvas_connector(**changes) -> ConfigDict:
    """The paper's canvas connector; its widths are those of the DiT."""
    return section(CanvasConnectorConfig, dtype="bfloat16", **changes)


def context_connector(**changes) -> ConfigDict:
    """The paper's context connector; its output has the width of the states that the DiT reads."""
    return section(ContextConnectorConfig, dtype="bfloat16", **changes)


def training(steps: int, batch: int, rules: tuple[tuple[str, str], ...]) -> ConfigDict:
    """A training as in the paper: no moving average. Previews are left to `metacanvas sample` on a checkpoint."""
    return section(schema.TrainSection(steps, batch, rules, ema=None, preview_every=0))


def sources(*rows: SourceSection) -> tuple[dict, ...]:
    """Sources in the form of a config."""
    return tuple(dataclasses.asdict(row) for row in rows)


def hardware(*rows: schema.Hardware) -> tuple[dict, ...]:
    """Slices in the form of a config; the first is the one that the head of the config file recommends."""
    return tuple(dataclasses.asdict(row) for row in rows)


def ratios(bucket: Bucket, sizes: Sequence[tuple[int, int]]) -> tuple[dict, ...]:
    """One bucket per size in the form of a config. They share the weight of ``bucket``, whose size is replaced."""
    return buckets(*(dataclasses.replace(bucket, size=size, weight=bucket.weight / len(sizes)) for size in sizes))


def lengths(bucket: Bucket, tokens: Sequence[int]) -> tuple[dict, ...]:
    """One bucket per length of prompts in the form of a config. They share the weight of ``bucket``."""
    weight = bucket.weight / len(tokens)
    return buckets(*(dataclasses.replace(bucket, length=n, by_length=True, weight=weight) for n in tokens))


def buckets(*rows: Bucket) -> tuple[dict, ...]:
    """Buckets in the form of a config."""
    return tuple(dataclasses.asdict(row) for row in rows)
