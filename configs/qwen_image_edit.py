"""Image editing: Qwen-Image-Edit-2511 with a canvas. It reads Qwen2.5-VL-7B's states as it was trained to.

Command:   metacanvas train --config configs/qwen_image_edit.py --workdir runs/qwen_image_edit
Variants:  canvas (the MLLM's states as they are, and its canvas), no_canvas (adapters alone), connector (Qwen3-VL-4B
           through a context connector, and its canvas), ratios (canvas in the 7 aspect ratios of Qwen-Image's model
           card; a cell covers 4 x 4 latents: 32 x 32 cells for 1024 x 1024, 24 x 43 for 768 x 1376)
Data:      OmniEdit and HQEdit at 1024 x 1024 in data/OmniEdit-1024 and data/HQEdit-1024, written by
           `metacanvas prepare` (docs/data.md). For ratios `metacanvas prepare --by-bucket` sorts them into
           data/OmniEdit-qwen-ratios and data/HQEdit-qwen-ratios
Hardware:  64 TPU v5p chips (4x4x4), 1 image per chip
Time:      about 11 h for 20,000 steps from stored latents (expected: 1.94 s a step, docs/performance.md); with the
           canvas a step takes 9 % longer than without
Score:     none yet: the paper has no experiment with this transformer
Chosen here: adapters of rank 32 on the attention of both streams; prompts, schedule and guidance as diffusers'
QwenImageEditPlusPipeline has them; the noise levels of training are shifted as those of sampling at 4,096 tokens.
"""

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.dit.qwen_image.network import qwen_image_edit_2511
from metacanvas_jax.dit.qwen_image.prompts import EDIT_PLUS
from metacanvas_jax.dit.qwen_image.sizes import EDIT_SIZES
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.wan.network import WAN21_VAE

VARIANTS = ("canvas", "no_canvas", "connector", "ratios")
FOLDER = f"{base.WEIGHTS}/Qwen-Image-Edit-2511"


def get_config(variant: str = "") -> ConfigDict:
    """Adapters with a canvas on native states, without one, with a canvas and a context connector, or in all sizes."""
    name, miniature = base.choose("configs/qwen_image_edit.py", VARIANTS, variant)
    canvas, ratios = name != "no_canvas", name == "ratios"
    config = base.get_config()
    config.name = f"qwen_image_edit_{name}"
    adapters = LoraConfig(rank=32, alpha=32.0, targets=("q", "k", "v", "out"))
    config.dit = base.section(
        qwen_image_edit_2511(lora=adapters, **base.LARGE | {"remat": "attention"}), kind="qwen_image"
    )
    config.dit_weights = config.vae_weights = FOLDER
    config.vae = base.section(WAN21_VAE, kind="wan", dtype="bfloat16")
    lora = LoraConfig(rank=64, alpha=64.0, dropout=0.05) if canvas else None
    config.mllm = base.qwen3("4B", lora) if name == "connector" else base.qwen("7B", lora)
    config.mllm.image_tokens = EDIT_PLUS.image_tokens
    if name == "connector":
        config.context_connector = base.context_connector()
    else:
        folders = {"weights": f"{FOLDER}/text_encoder", "tokenizer": f"{FOLDER}/tokenizer"}
        config.mllm.update(folders | {"system": EDIT_PLUS.system, "image_label": EDIT_PLUS.image_label})
        config.mllm.assistant = True
        config.context_connector = base.context_connector(kind="identity", skip=EDIT_PLUS.skip)
    if canvas:
        config.canvas = base.section(CanvasConfig(rows=32, columns=32, latents_per_cell=4 if ratios else None))
        config.canvas_connector = base.canvas_connector()
    bucket = Bucket("image_editing", (1024, 1024), length=512)
    config.buckets = base.ratios(bucket, EDIT_SIZES) if ratios else base.buckets(bucket)
    folder, how = "qwen-ratios" if ratios else "1024", {"max_skips": 1000, "by_size": ratios}
    config.sources = base.sources(
        SourceSection("records", f"{base.DATA}/OmniEdit-{folder}", "image_editing", weight=0.9, **how),
        SourceSection("records", f"{base.DATA}/HQEdit-{folder}", "image_editing", weight=0.1, **how),
    )
    config.data.caption_dropout = 0.1  # sampling uses guidance
    config.time = base.section(TimeConfig(shift=2.0))
    growth = DynamicShift(max_shift=0.9, max_tokens=8192, terminal=0.02)
    sampler = schema.SamplerSection("dynamic", "euler", steps=40, guidance=4.0, dynamic=growth, rescale=True)
    config.sampler = base.section(sampler)
    config.optimizer = base.section(OptimizerConfig(learning_rate=1e-4, warmup_steps=300, warmup_from=1e-5))
    rules = (("(mllm|dit)/.*_lora/.*", "train"), ("(mllm|dit|vae)/.*", "freeze"))
    config.train = base.training(20_000, 64, (*rules, (".*", "train")) if canvas else rules)
    config.mesh = base.section(MeshConfig(data=4, fsdp=16, whole=("mllm",)))
    smaller = ("--config.mesh.whole=()", "--config.dit.remat=full")
    config.hardware = base.hardware(schema.Hardware("v5p:4x4x4"), schema.Hardware("v6e:8x8", overrides=smaller))
    return tiny.shrink(config, miniature) if miniature else config
