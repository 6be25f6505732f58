"""Image editing and text-to-image with FLUX.2-klein-base-4B: it reads an MLLM instead of Qwen3, and its canvas.

Command:   metacanvas train --config configs/flux2_klein.py --workdir runs/flux2_klein
Variants:  canvas (edits, Qwen2.5-VL-7B through a context connector, and its canvas), no_canvas (context alone),
           qwen3_vl_4b (as canvas, with Qwen3-VL-4B), text_to_image (as canvas, from words)
Data:      OmniEdit and HQEdit at 1024 x 1024 in data/OmniEdit-1024 and data/HQEdit-1024, written by
           `metacanvas prepare` (docs/data.md). For text_to_image BLIP3o-60k
Hardware:  16 TPU v5p chips (2x2x4), 4 images per chip
Time:      not measured; expected 4.0 s a step (3.3 to 4.9) of 64 edits, 22 h for 20,000 steps, 17.5 of 95.7 GiB;
           with the canvas a step takes 18 % longer than without, as the MLLM is larger than the transformer
Score:     none yet: the paper has no experiment with this transformer
Chosen here: adapters of rank 32 on the projections that community recipes adapt; the noise levels of training are
shifted as those of sampling in 200 steps at 4,096 tokens. The base model trains; the adapters can be drawn with on the
distilled FLUX.2-klein-4B, in 4 steps without guidance.
"""

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.flux2.network import flux2_klein_4b
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.flux2.network import FLUX2_VAE

VARIANTS = ("canvas", "no_canvas", "qwen3_vl_4b", "text_to_image")
FOLDER = f"{base.WEIGHTS}/FLUX.2-klein-base-4B"


def get_config(variant: str = "") -> ConfigDict:
    """Edits with a canvas of one of two MLLMs or without one, or pictures from words with a canvas."""
    name, miniature = base.choose("configs/flux2_klein.py", VARIANTS, variant)
    canvas, words = name != "no_canvas", name == "text_to_image"
    config = base.get_config()
    config.name = f"flux2_klein_{name}"
    adapters = LoraConfig(rank=32, alpha=32.0, targets=("q", "k", "v", "out", "qkv_up"))
    config.dit = base.section(flux2_klein_4b(lora=adapters, **base.LARGE), kind="flux2")
    config.dit_weights = config.vae_weights = FOLDER
    config.vae = base.section(FLUX2_VAE, kind="flux2", dtype="bfloat16")
    lora = LoraConfig(rank=64, alpha=64.0, dropout=0.05) if canvas else None
    config.mllm = base.qwen3("4B", lora) if name == "qwen3_vl_4b" else base.qwen("7B", lora)
    config.context_connector = base.context_connector()
    if canvas:
        config.canvas = base.section(CanvasConfig(rows=32, columns=32))
        config.canvas_connector = base.canvas_connector()
    task = "text_to_image" if words else "image_editing"
    config.buckets = base.buckets(Bucket(task, (1024, 1024), length=512))
    if words:
        config.sources = base.sources(SourceSection("webdataset", f"{base.DATA}/BLIP3o-60k/*.tar", max_skips=100))
    else:
        config.sources = base.sources(
            SourceSection("records", f"{base.DATA}/OmniEdit-1024", task, weight=0.9, max_skips=1000),
            SourceSection("records", f"{base.DATA}/HQEdit-1024", task, weight=0.1, max_skips=1000),
        )
    config.data.caption_dropout = 0.1  # sampling uses guidance
    config.time = base.section(TimeConfig(shift=3.16))
    config.sampler = base.section(schema.SamplerSection("flux2_empirical", "euler", steps=50, guidance=4.0))
    config.optimizer = base.section(OptimizerConfig(learning_rate=1e-4, warmup_steps=300, warmup_from=1e-5))
    rules = (("(mllm|dit)/.*_lora/.*", "train"), ("(mllm|dit|vae)/.*", "freeze"), (".*", "train"))
    config.train = base.training(20_000, 64, rules)
    config.mesh = base.section(MeshConfig(fsdp=16))
    config.hardware = base.hardware(schema.Hardware("v5p:2x2x4"))
    return tiny.shrink(config, miniature) if miniature else config
