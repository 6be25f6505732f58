"""Video, stage 1: the context connector learns to replace the UMT5 of Wan2.2-TI2V-5B (paper, Table 16).

Command:   metacanvas train --config configs/video_stage1.py --workdir runs/video_stage1
Data:      images at 480 x 832: text-to-image 80 %, reconstruction 20 % (data/images: captioned images, written by
           `metacanvas prepare`)
Trained:   context connector
Hardware:  128 TPU v5p chips (4x4x8), 32 images per chip
Time:      about 35 h for 100,000 steps from stored latents (expected: 1.26 s a step, docs/performance.md)
Score:     none of its own; stage 2 starts from it
"""

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.wan.network import wan2_2_ti2v_5b
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.wan.network import WAN22_VAE

VARIANTS = ("full",)
CHIPS = 128
FOLDER = f"{base.WEIGHTS}/Wan2.2-TI2V-5B-Diffusers"
SIZE = (480, 832)
TASKS = ("text_to_image", "reconstruction")


def get_config(variant: str = "") -> ConfigDict:
    """Connector alignment; the other stages start from this config."""
    _, miniature = base.choose("configs/video_stage1.py", VARIANTS, variant)
    config = base.get_config()
    config.name = "video_stage1"
    # The results of products of 12,480 image tokens take 25 GB. There is memory for them, so that the backward pass
    # repeats none.
    dit = wan2_2_ti2v_5b(mask_context=True, **base.VIDEO | {"remat": "dots"})
    config.dit = base.section(dit, kind="wan")
    config.dit_weights = f"{FOLDER}/transformer"
    config.vae = base.section(WAN22_VAE, kind="wan", dtype="bfloat16")
    config.vae_weights = f"{FOLDER}/vae"
    config.mllm = base.qwen("7B")
    config.context_connector = base.context_connector()
    config.buckets = base.buckets(Bucket("text_to_image", SIZE, weight=0.8), Bucket("reconstruction", SIZE, weight=0.2))
    config.sources = base.sources(
        *(SourceSection("records", f"{base.DATA}/images", task, max_skips=1000) for task in TASKS)
    )
    config.data.caption_dropout = 0.1  # sampling uses guidance
    config.time = base.section(TimeConfig("uniform", shift=5.0))  # Wan's shift, in training as in sampling
    config.sampler = base.section(schema.SamplerSection("wan_unipc", "unipc", steps=50, shift=5.0, guidance=5.0))
    config.optimizer = base.section(OptimizerConfig(learning_rate=1e-3, warmup_steps=100))
    rules = (("context_connector/.*", "train"), (".*", "freeze"))
    config.train = base.training(100_000, 32 * CHIPS, rules)
    config.mesh = base.section(MeshConfig(fsdp=32))
    config.hardware = base.hardware(schema.Hardware("v5p:4x4x8"), schema.Hardware("v6e:16x16"))
    return tiny.shrink(config, miniature) if miniature else config
