"""Text-to-image from scratch: SANA 1.6B learns to paint while a frozen Qwen2.5-VL-3B plans (paper 3.1; Fig. 4, 9, 10).

Command:   metacanvas train --config configs/t2i_scratch.py:canvas --workdir runs/t2i_scratch/canvas
Variants:  canvas          text and canvas (the method)                        Fig. 4 (1)
           canvas_only     canvas; the text encoder gets the empty prompt      Fig. 4 (2)
           text            SANA unchanged: its own text encoder, no MLLM        Fig. 4 (3)
           metaquery       256 learnable queries in place of the text          Fig. 4 (4)
           text_metaquery  the text, followed by the 256 queries               Fig. 4 (5)
           lengths         as canvas, prompts of up to 96, 160 and 256 tokens in buckets of their own
Data:      BLIP3o-60k at 512 x 512. For lengths `metacanvas prepare --by-bucket` sorts it into data/BLIP3o-60k-lengths
           (docs/data.md, "Prompts of several lengths")
Hardware:  16 TPU v6e chips (4x4), 20 images per chip
Time:      about 2.9 h for 20,000 steps from stored latents (expected: 0.52 s a step, docs/performance.md)
Score:     GenEval 68.02 (canvas), 64.09 (text); (1) learns fastest and has the best score, (2) works without text
"""

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax.config import schema
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.connectors.queries import QueriesConfig
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.sana.network import sana_1600m
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32

VARIANTS = ("canvas", "canvas_only", "text", "metaquery", "text_metaquery", "lengths")
LENGTHS = (96, 160, 256)  # tokens of prompts, chat template included
# On v5e neither the whole MLLM nor the activations of 20 samples have room.
SMALL = ("--config.mesh.whole=()", "--config.train.accumulate=2")


def get_config(variant: str = "") -> ConfigDict:
    """One of Fig. 4's five, or the first with prompts of several lengths."""
    name, miniature = base.choose("configs/t2i_scratch.py", VARIANTS, variant)
    config = base.get_config()
    config.name = f"t2i_scratch_{name}"
    dit = sana_1600m(zero_init_out=True, **base.LARGE)
    config.dit = base.section(dit, kind="sana")
    config.vae = base.section(DC_AE_F32C32, kind="dc_ae", dtype="bfloat16")
    config.vae_weights = f"{base.WEIGHTS}/Sana_1600M_512px_diffusers/vae"
    config.mllm = base.qwen("3B")
    if name != "metaquery":
        config.text = base.gemma()
        config.text.reads_prompt = name != "canvas_only"
    if name in ("canvas", "canvas_only", "lengths"):
        config.canvas = base.section(CanvasConfig(rows=16, columns=16))
        config.canvas_connector = base.canvas_connector()
    if name in ("metaquery", "text_metaquery"):
        config.queries = base.section(QueriesConfig(256, after_context=False))
        config.context_connector = base.context_connector()
    bucket = Bucket("text_to_image", (512, 512), length=256)
    config.buckets = base.lengths(bucket, LENGTHS) if name == "lengths" else base.buckets(bucket)
    source = SourceSection("webdataset", f"{base.DATA}/BLIP3o-60k/*.tar", max_skips=100)
    if name == "lengths":
        source = SourceSection("records", f"{base.DATA}/BLIP3o-60k-lengths", by_size=True, max_skips=100)
    config.sources = base.sources(source)
    config.data.caption_dropout = 0.1  # SANA's recipe; sampling uses guidance
    config.time = base.section(TimeConfig(shift=3.0))  # SANA's recipe
    config.sampler = base.section(schema.SamplerSection("sana_dpm", "dpmpp_2m", steps=20, shift=3.0, guidance=4.5))
    rules = (("(mllm|text|vae)/.*", "freeze"), (".*", "train"))
    config.train = base.training(20_000, 320, rules)
    # Each of four devices holds 560 of SANA's 2,240 rows. With eight devices it would be 280, which is no multiple of
    # 16: the compiler would then sum gradients by all-reduces, at twice the bytes of reduce-scatters.
    config.mesh = base.section(MeshConfig(fsdp=4, whole=("mllm",)))
    config.hardware = base.hardware(
        schema.Hardware("v6e:4x4"),
        schema.Hardware("v5e:4x4", overrides=SMALL),
        schema.Hardware("v5e:4x4", overrides=SMALL, pixels=True),
    )
    return tiny.shrink(config, miniature) if miniature else config
