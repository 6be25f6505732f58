"""Published folders, unchanged: the sizes of all networks are read from the folders that the variant names.

Command:   metacanvas sample --config configs/published.py:Sana_1600M_512px_diffusers --prompt "a red cat"
           metacanvas edit --config configs/published.py:FLUX.1-Kontext-dev,Qwen2.5-VL-7B-Instruct
               --image cat.png --prompt "make the cat blue"
           metacanvas sample --config configs/published.py:Wan2.2-TI2V-5B-Diffusers,Qwen2.5-VL-7B-Instruct
               --image duck.png --prompt "the duck swims"
           metacanvas edit --config configs/published.py:Qwen-Image-Edit-2511 --image cat.png --prompt "a blue cat"
           metacanvas sample --config configs/published.py:FLUX.2-klein-4B --prompt "a red cat"
Variant:   PIPELINE or PIPELINE,MLLM: folders of diffusers and of transformers. SANA and FLUX.2 [klein] paint alone,
           with their own text encoders. Qwen-Image's own text encoder is an MLLM: it reads the published prompt, and
           its states go to the transformer as they are. FLUX.1 and Wan, and Qwen-Image where an MLLM is named, read the
           MLLM through a context connector in place of their text encoders. Connector and canvas are published nowhere
           and start fresh: the canvas changes nothing before it is trained.
"""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from metacanvas_jax import files, registry
from metacanvas_jax.config import schema
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.weights import published
from metacanvas_jax.weights.record import NativePrompt, Pipeline

DTYPE = "bfloat16"
LENGTH = 1024  # of prompts, media included
IMAGE_TOKENS = 144  # as in the paper


def get_config(folders: str = "") -> ConfigDict:
    """The experiment that the folders make, with the published schedule of the pipeline."""
    pipeline, _, mllm = folders.partition(",")
    if not pipeline:
        raise UserError("configs/published.py needs folders: configs/published.py:PIPELINE or :PIPELINE,MLLM")
    dit = registry.published_config(published.subfolder(pipeline, "transformer"), "dit")
    vae = registry.published_config(published.subfolder(pipeline, "vae"), "vae")
    record, paints = registry.of(dit), described(pipeline, registry.of(dit).pipeline)
    config = base.get_config()
    config.name = Path(pipeline).name
    config.dit_weights = config.vae_weights = pipeline
    config.vae = base.section(vae, kind=registry.of(vae).name, dtype=DTYPE, **registry.of(vae).settings)

    own_text = paints.text_encoder and (Path(pipeline) / "text_encoder").is_dir()
    native = None if mllm else native_prompt(pipeline, paints)
    if not mllm and not own_text and native is None:
        raise UserError(f"{pipeline}: its text encoders are not built here; name an MLLM after a comma")
    if own_text:
        encoder = registry.published_config(Path(pipeline) / "text_encoder", "text")
        tokenizer = str(published.subfolder(pipeline, "tokenizer"))
        encoder = dataclasses.replace(encoder, dtype=DTYPE)
        text = schema.TextSection(encoder, pipeline, tokenizer, length=paints.text_length)
        config.text = base.section(text, kind=registry.of(encoder).name)
    if getattr(dit, "guidance", False):
        config.dit_guidance = paints.dit_guidance
    dit = dataclasses.replace(dit, dtype=DTYPE, **record.settings)
    config.dit = base.section(dit, kind=record.name)
    section = reader(mllm) if native is None else native_reader(pipeline, native)
    bucket = dataclasses.replace(paints.bucket(dit, vae.spatial), length=max(section.buckets[-1], LENGTH))
    config.buckets = base.buckets(bucket)
    config.mllm = base.section(section)
    if section.weights:
        patch = registry.module(dit).patch[1:]
        rows, columns = (side // vae.spatial // latents for side, latents in zip(bucket.size, patch, strict=True))
        config.canvas = base.section(CanvasConfig(rows, columns, keyframes=1 if bucket.frames == 1 else 3))
        heads = {"vanilla_head_width": math.gcd(dit.width, 64), "head_width": math.gcd(dit.width, 32)}
        config.canvas_connector = base.canvas_connector(**heads)
        if native is not None:
            config.context_connector = base.context_connector(kind="identity", skip=native.skip)
        elif not own_text:
            config.context_connector = base.context_connector()
    new = ["canvas", "canvas_connector", *([] if own_text or native else ["context_connector"])]
    new += sorted({f"dit/{entry.path.partition('/')[0]}" for entry in record.added(dit)})
    config.train.rules = (
        ((f"({'|'.join(new)})/.*", "train"), (".*", "freeze")) if section.weights else ((".*", "freeze"),)
    )
    config.data.caption_dropout = 0.1 if paints.guidance != 1.0 else 0.0  # guidance needs the empty prompt
    sampling = registry.published_sampling(pipeline, record)._asdict()
    sampler = schema.SamplerSection(steps=paints.steps, guidance=paints.guidance, rescale=paints.rescale, **sampling)
    config.sampler = base.section(sampler)
    return config


def described(pipeline: str, paints: Pipeline) -> Pipeline:
    """How the pipeline paints by default, as its index says where there is one."""
    index = files.folder(pipeline) / "model_index.json"
    return dataclasses.replace(paints, **paints.indexed(published.read_json(index))) if index.is_file() else paints


def native_prompt(pipeline: str, paints: Pipeline) -> NativePrompt | None:
    """How the pipeline words its prompts, where its own text encoder is an MLLM that is built here."""
    index = files.folder(pipeline) / "model_index.json"
    if not paints.prompts or not index.is_file():
        return None
    name = published.model_name(published.read_json(index))
    if name not in paints.prompts:
        raise UserError(f"{index}: the pipeline is {name}, expected {' or '.join(paints.prompts)}, or an MLLM by name")
    return paints.prompts[name]


def native_reader(pipeline: str, native: NativePrompt) -> schema.MllmSection:
    """The MLLM in the pipeline's own folder, with the prompts that the transformer was trained on."""
    return dataclasses.replace(
        reader(str(published.subfolder(pipeline, "text_encoder"))),
        tokenizer=str(published.subfolder(pipeline, "tokenizer")),
        buckets=(LENGTH + native.skip + native.image_tokens,),
        image_tokens=native.image_tokens or IMAGE_TOKENS,
        system=native.system,
        assistant=True,
        image_label=native.image_label,
    )


def reader(folder: str) -> schema.MllmSection:
    """The MLLM of a folder. Without a folder it is the smallest possible one, which no part reads."""
    if not folder:
        smallest = registry.family("mllm")[schema.MllmSection.kind].tiny["language"]
        return schema.MllmSection(smallest, None, buckets=(1,))
    config = registry.published_config(folder, "mllm")
    language = dataclasses.replace(config.language, dtype=DTYPE)
    vision = dataclasses.replace(config.vision, dtype=DTYPE)
    return schema.MllmSection(
        language,
        vision,
        weights=folder,
        tokenizer=folder,
        buckets=(LENGTH,),
        image_tokens=IMAGE_TOKENS,
        kind=registry.of(config).name,
        **registry.of(config).settings,
    )
