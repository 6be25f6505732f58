"""Image editing: FLUX.1-Kontext-dev reads Qwen2.5-VL-7B instead of its text encoders, and its canvas (paper 3.2).

Command:   metacanvas train --config configs/image_editing.py --workdir runs/image_editing
Variants:  canvas (the method), no_canvas (context alone)
Data:      OmniEdit and HQEdit, about a million edits, at 512 x 512 in data/OmniEdit-512 and data/HQEdit-512: shuffled
           rows of their parquet files are slow, so `metacanvas prepare` writes them first (docs/data.md)
Hardware:  64 TPU v5p chips (4x4x4), 1 image per chip
Time:      about 35 h for 90,000 steps (estimate: 16 PFLOP a step at 40 % of peak)
Score:     ImgEdit 3.86 (before 3.52), GEdit-EN G_O 7.67 (before 6.00)
Chosen here, as the paper does not say: the vision branch is the image stream of the double blocks; the pooled CLIP
vector becomes a projection of the mean context that starts at zero; the guidance scale that FLUX reads is 1.
"""

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.flux.network import flux_kontext_dev
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.kl.network import KL_F8C16

VARIANTS = ("canvas", "no_canvas")
FOLDER = f"{base.WEIGHTS}/FLUX.1-Kontext-dev"


def get_config(variant: str = "") -> ConfigDict:
    """Table 13's run, or the same without canvas."""
    name, miniature = base.choose("configs/image_editing.py", VARIANTS, variant)
    canvas = name == "canvas"
    config = base.get_config()
    config.name = f"image_editing_{name}"
    # One image per chip leaves memory for the results of products, so that the backward pass does not repeat them.
    dit = flux_kontext_dev(pooled="learned", mask_context=True, **base.LARGE | {"remat": "dots"})
    config.dit = base.section(dit, kind="flux")
    config.dit_weights = f"{FOLDER}/transformer"
    config.dit_guidance = 1.0
    config.vae = base.section(KL_F8C16, kind="kl", dtype="bfloat16")
    config.vae_weights = f"{FOLDER}/vae"
    config.mllm = base.qwen("7B", LoraConfig(rank=64, alpha=64.0, dropout=0.05) if canvas else None)
    if canvas:
        config.mllm.language.remat = "none"  # there is memory for the activations of 1,024 canvas tokens
        config.canvas = base.section(CanvasConfig(rows=32, columns=32))
        config.canvas_connector = base.canvas_connector()
    # The sizes of UniWorld-V1's connector; the paper starts from it (context_connector.weights, docs/backbones.md).
    config.context_connector = base.context_connector(hidden=12288, activation="silu")
    config.buckets = base.buckets(Bucket("image_editing", (512, 512), length=384))
    config.sources = base.sources(
        SourceSection("records", f"{base.DATA}/OmniEdit-512", "image_editing", weight=0.9, max_skips=1000),
        SourceSection("records", f"{base.DATA}/HQEdit-512", "image_editing", weight=0.1, max_skips=1000),
    )
    config.data.caption_dropout = 0.0  # sampling uses no guidance: without its instruction an edit teaches nothing
    config.time = base.section(TimeConfig(shift=1.88))  # what FLUX's dynamic shift is for 1,024 tokens
    config.sampler = base.section(schema.SamplerSection("flux_dynamic", "euler", steps=28, guidance=1.0))
    config.optimizer = base.section(OptimizerConfig(learning_rate=1e-6, b2=0.99))
    adapters = (("mllm/.*_lora/.*", "train"),) if canvas else ()
    rules = (*adapters, ("dit/(double/image|pool)/.*", "train"), ("(mllm|dit|vae)/.*", "freeze"), (".*", "train"))
    config.train = base.training(90_000, 64, rules)
    # With weights sharded over all 64 chips the compiler gathers them by all-reduces: twice the bytes of all-gathers.
    # More than half of a chip's memory is free, so that each chip can hold the whole MLLM.
    config.mesh = base.section(MeshConfig(fsdp=16, whole=("mllm",)))
    recomputed = ("--config.dit.remat=full", "--config.mllm.language.remat=full")
    config.hardware = base.hardware(
        schema.Hardware("v5p:4x4x4"),
        schema.Hardware("v6e:8x8", overrides=recomputed),
    )
    return tiny.shrink(config, miniature) if miniature else config
