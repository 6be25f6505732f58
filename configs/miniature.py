"""MetaCanvas in miniature: OpenMoji scenes, a tiny Qwen2.5-VL, a tiny SANA; everything learns in minutes on a CPU.

Command:   metacanvas demo                      (or `make demo`: all stages, then scores and a report)
           metacanvas train --config configs/miniature.py:base --workdir runs/base
           metacanvas train --config configs/miniature.py:canvas --workdir runs/canvas --config.start=runs/base
           metacanvas teach --out runs/miniature/taught    (or `make teach`: the MLLM that ships, from nothing)
Hardware:  2 CPU cores
"""

from pathlib import Path

from ml_collections import ConfigDict

import metacanvas_jax
from configs import base
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.vae.patch_pca.network import PatchPcaConfig
from metacanvas_jax.worlds.scenes import SceneWorld

VARIANTS = ("canvas", "text", "base", "mllm")
BASE, CANVAS = 1500, 3000  # steps of the DiT before a canvas is added, and with it
OBJECTS = ("cat", "car", "tree", "house", "star", "heart", "mushroom", "duck")
# With six colours only, an object in a combination that training held out is drawn in a similar colour, or not at all.
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "turquoise", "grey")
MIXTURE = (
    ("single_object", 0.21),
    ("two_object", 0.11),
    ("counting", 0.10),
    ("colors", 0.14),
    ("position", 0.14),
    ("color_attr", 0.12),
    ("place", 0.14),
    ("group", 0.04),
)
CACHE = "runs/miniature"
SHIPPED = Path(metacanvas_jax.__file__).resolve().parent / "miniature" / "mllm"
CELLS = " A B C D E F G H I J K L M N O P"  # the cells of a sheet, which the MLLM was taught to tell facts at


def get_config(variant: str = "canvas") -> ConfigDict:
    """``mllm`` teaches the MLLM; under it ``base`` trains a DiT, to which ``canvas`` adds a canvas; ``text`` has none.

    As in the paper's video stages the canvas comes to a DiT that was trained before. `metacanvas demo` sets ``start``
    of ``canvas`` to the run of ``base``; without a ``start``, ``canvas`` begins with a new DiT. ``text`` has as many
    steps as both.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/miniature.py has the variants {', '.join(VARIANTS)}, not {variant!r}")
    config = base.get_config()
    config.name = f"miniature_{variant}"
    world = SceneWorld(size=60, patch=15, cell=30, sprite=28, objects=OBJECTS, colours=COLOURS, mixture=MIXTURE)
    config.world = base.section(world)
    config.data = base.section(schema.DataSection(path=f"{CACHE}/data", caption_dropout=0.1))
    config.eval.evaluators = ("scenes",)
    config.eval.per_category = config.eval.per_category_held_out = 100  # the standard error of a score is at most .05
    language = LanguageConfig(
        vocab=527,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        mlp=384,
        rope_sections=(4, 6, 6),
        rope_theta=1e4,
        tied=True,
        unroll=4,
    )
    # One token for each cell of the canvas.
    vision = VisionConfig(
        depth=3,
        width=128,
        heads=4,
        mlp=256,
        out_width=128,
        full_attention_layers=(0, 1, 2),
        patch=15,
        merge=1,
        window=60,
    )
    config.mllm = base.section(
        schema.MllmSection(
            language,
            vision,
            tokenizer=f"{CACHE}/tokenizer" if variant == "mllm" else str(SHIPPED / "tokenizer"),
            buckets=(24,),
            system=None,
            image_pixels=(144, 3600),
        ),
        weights="" if variant == "mllm" else str(SHIPPED),
        context_memory=0.0 if variant == "mllm" else 0.5,
    )
    if variant == "mllm":
        return understanding(config)
    painting(config, {"base": BASE, "canvas": CANVAS, "text": BASE + CANVAS}[variant], canvas=variant == "canvas")
    if variant == "base":  # its rate does not fall: the training goes on with the canvas
        config.optimizer.update({"schedule": "constant", "total_steps": None, "final_fraction": 0.0})
        config.train.update({"preview_every": 0, "evaluate_every": 0})
    return config


def understanding(config: ConfigDict) -> ConfigDict:
    """Questions about pictures and prompts; and sheets, where states must tell what a painter needs to know."""
    config.objective = "understand"
    config.facts = 0.3
    config.data = base.section(schema.DataSection(path=f"{CACHE}/lessons", count=40_000))
    steps = 24000
    config.optimizer = base.section(
        OptimizerConfig(learning_rate=3e-3, warmup_steps=100, schedule="cosine", total_steps=steps, b2=0.99)
    )
    config.train = base.section(
        schema.TrainSection(steps=steps, batch=32, rules=((".*", "train"),), ema=None, frozen_dtype="float32"),
        checkpoint_every=500,
    )
    config.mllm.buckets = (40,)
    return config


def painting(config: ConfigDict, steps: int, canvas: bool) -> None:
    """SANA under a frozen MLLM."""
    if canvas:
        config.canvas = base.section(CanvasConfig(rows=4, columns=4, start=CELLS))
        config.canvas_connector = base.section(CanvasConnectorConfig, vanilla_ratio=2.0, mlp_ratio=1.5)
    config.context_connector = base.section(ContextConnectorConfig, expansion=2, dropout=0.0)
    config.dit = base.section(
        SanaConfig(
            latent_channels=64,
            heads=4,
            head_width=32,
            cross_heads=2,
            layers=4,
            mlp_ratio=1.5,
            context_width=128,
            caption_norm_init=1.0,
            zero_init_out=True,
            predicts="data",
            unroll=4,
            interpolation_scale=1.0,
            sample_size=4,
        ),
        kind="sana",
    )
    config.vae = base.section(PatchPcaConfig(patch=15, channels=64), kind="patch_pca")
    config.vae_weights = f"{CACHE}/vae"
    # Training draws mostly high noise levels: at these the model decides where each object lies. With fewer of them it
    # draws two objects, or none, in place of one.
    config.time = base.section(TimeConfig(mean=1.5, std=1.2))
    config.optimizer = base.section(
        OptimizerConfig(
            learning_rate=2.1e-3, warmup_steps=40, schedule="cosine", total_steps=steps, final_fraction=0.02, b2=0.99
        )
    )
    config.sampler.guidance = 1.5  # a larger scale adds objects that the prompt does not name
    config.train = base.section(
        schema.TrainSection(
            steps=steps,
            batch=40,
            rules=(("(mllm|vae)/.*", "freeze"), (".*", "train")),
            frozen_dtype="float32",
            preview_every=750,
            evaluate_every=750,
        )
    )
