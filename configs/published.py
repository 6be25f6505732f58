"""Published folders, unchanged: the sizes of all networks are read from the folders that the variant names.

Command:   metacanvas sample --config configs/published.py:Sana_1600M_512px_diffusers --prompt "a red cat"
           metacanvas edit --config configs/published.py:FLUX.1-Kontext-dev,Qwen2.5-VL-7B-Instruct
               --image cat.png --prompt "make the cat blue"
           metacanvas sample --config configs/published.py:Wan2.2-TI2V-5B-Diffusers,Qwen2.5-VL-7B-Instruct
               --image duck.png --prompt "the duck swims"
Variant:   PIPELINE or PIPELINE,MLLM: folders of diffusers and of transformers. SANA paints alone, with its own text
           encoder. FLUX and Wan read an MLLM through a context connector in place of theirs; connector and canvas are
           published nowhere and start fresh.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from metacanvas_jax import registry
from metacanvas_jax.config import schema
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.wan.network import WanVaeConfig
from metacanvas_jax.weights import published

DTYPE = "bfloat16"
STEPS = {"sana": 20, "flux": 28, "wan": 50}
GUIDANCE = {"sana": 4.5, "flux": 1.0, "wan": 5.0}  # FLUX reads a guidance scale instead
DIT_GUIDANCE = 3.5
LENGTH = 1024  # of prompts, media included
IMAGE_TOKENS = 144  # as in the paper


def get_config(folders: str = "") -> ConfigDict:
    """The experiment that the folders make, with the published schedule of the pipeline."""
    pipeline, _, mllm = folders.partition(",")
    if not pipeline:
        raise UserError("configs/published.py needs folders: configs/published.py:PIPELINE or :PIPELINE,MLLM")
    dit = registry.published_config(published.subfolder(pipeline, "transformer"), "dit")
    vae = registry.published_config(published.subfolder(pipeline, "vae"), "vae")
    kind = registry.of(dit).name
    config = base.get_config()
    config.name = Path(pipeline).name
    config.dit_weights = config.vae_weights = pipeline
    changes = {"chunk": 1} if isinstance(vae, WanVaeConfig) else {}
    vae_kind = registry.of(vae).name
    config.vae = base.section(dataclasses.replace(vae, dtype=DTYPE, **changes), kind=vae_kind)

    own_text = kind == "sana" and (Path(pipeline) / "text_encoder").is_dir()
    if not mllm and not own_text:
        raise UserError(f"{pipeline}: its text encoders are not built here; name an MLLM after a comma")
    if own_text:
        encoder = registry.published_config(Path(pipeline) / "text_encoder", "text")
        tokenizer = str(published.subfolder(pipeline, "tokenizer"))
        text = schema.TextSection(dataclasses.replace(encoder, dtype=DTYPE), pipeline, tokenizer)
        config.text = base.section(text)
    if kind == "flux":
        dit = dataclasses.replace(dit, pooled="learned", mask_context=True)
        config.dit_guidance = DIT_GUIDANCE if dit.guidance else None
    elif kind == "wan":
        dit = dataclasses.replace(dit, mask_context=True)
    config.dit = base.section(dataclasses.replace(dit, dtype=DTYPE), kind=kind)
    bucket = shape(kind, dit, vae)
    config.buckets = base.buckets(bucket)
    config.mllm = base.section(reader(mllm))
    if mllm:
        patch = registry.module(dit).patch[1:]
        rows, columns = (side // vae.spatial // latents for side, latents in zip(bucket.size, patch, strict=True))
        config.canvas = base.section(CanvasConfig(rows, columns, keyframes=1 if bucket.frames == 1 else 3))
        heads = {"vanilla_head_width": math.gcd(dit.width, 64), "head_width": math.gcd(dit.width, 32)}
        config.canvas_connector = base.canvas_connector(**heads)
        if not own_text:
            config.context_connector = base.context_connector()
    new = ["canvas", "canvas_connector", *([] if own_text else ["context_connector"])]
    new += ["dit/pool"] if kind == "flux" else []
    config.train.rules = ((f"({'|'.join(new)})/.*", "train"), (".*", "freeze")) if mllm else ((".*", "freeze"),)
    schedule, method, shift = registry.published_sampling(pipeline)
    sampler = schema.SamplerSection(schedule, method, STEPS[kind], shift, GUIDANCE[kind])
    config.sampler = base.section(sampler)
    return config


def reader(folder: str) -> schema.MllmSection:
    """The MLLM of a folder. Without a folder it is the smallest possible one, which no part reads."""
    if not folder:
        nothing = LanguageConfig(vocab=1, width=2, layers=1, heads=1, kv_heads=1, mlp=1, rope_sections=(1, 0, 0))
        return schema.MllmSection(nothing, None, buckets=(1,))
    config = registry.published_config(folder, "mllm")
    language = dataclasses.replace(config.language, dtype=DTYPE)
    vision = dataclasses.replace(config.vision, dtype=DTYPE)
    return schema.MllmSection(
        language, vision, weights=folder, tokenizer=folder, buckets=(LENGTH,), image_tokens=IMAGE_TOKENS
    )


def shape(kind: str, dit: Any, vae: Any) -> Bucket:
    """What the pipeline draws by default."""
    if kind == "wan":
        return Bucket("text_to_video", (704, 1280), frames=121, fps=24.0, length=LENGTH)
    side = dit.sample_size * dit.patch * vae.spatial if kind == "sana" else 1024
    return Bucket("text_to_image", (side, side), length=LENGTH)
