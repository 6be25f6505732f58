"""The cases of ``gpu_full.py``: shipped configs as one GPU trains them, at published sizes or tiny."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base, tiny
from metacanvas_jax import registry
from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN, SourceSection
from metacanvas_jax.parallel.mesh import MeshConfig

STEPS = 20  # of a training
TINY_TEXT = 24  # tokens of a tiny DiT's own text encoder

# Stage 3 trains the whole DiT: with AdamW in float32 that takes 80 GB. With stage 2's share of it a video fits less.
CROSS = (
    ("mllm/.*_lora/.*", "train"),
    ("(mllm|vae)/.*", "freeze"),
    ("dit/(blocks/cross|extra_in)/.*", "train"),
    ("dit/.*", "freeze"),
    (".*", "train"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on one GPU: ``batch`` samples a step of the bucket ``task``, of ``frames`` where that makes a video.

    ``folder`` is the pipeline whose transformer and autoencoder it uses. ``rules`` replace those of the config.
    """

    name: str
    config: str
    folder: str
    batch: int
    task: str
    frames: int = 1
    rules: tuple[tuple[str, str], ...] = ()


SANA, FLUX, WAN = "Sana_1600M_512px_diffusers", "FLUX.1-Kontext-dev", "Wan2.2-TI2V-5B-Diffusers"
STAGE3 = "configs/video_stage3.py:keyframes_3"
CASES = {
    case.name: case
    for case in (
        Case("t2i_scratch", "configs/t2i_scratch.py:canvas", SANA, 16, "text_to_image"),
        Case("t2i_lora", "configs/t2i_lora.py:dit_lora", SANA, 16, "text_to_image"),
        Case("image_editing", "configs/image_editing.py:canvas", FLUX, 1, "image_editing"),
        Case("image_editing_2", "configs/image_editing.py:canvas", FLUX, 2, "image_editing"),
        Case("video_25_cross", STAGE3, WAN, 1, "text_to_video", 25, CROSS),
        Case("video_25", STAGE3, WAN, 1, "text_to_video", 25),
        Case("video_121", STAGE3, WAN, 1, "text_to_video", 121),
    )
}


def config_of(case: Case, folders: Path, small: bool) -> ConfigDict:
    """The config of a case whose weights lie in ``folders``; ``small``: with tiny networks, in float32.

    Every network recomputes as it does in PyTorch: the blocks of the DiT are recomputed, the MLLM keeps its
    activations. There is no dropout in adapters, no moving average and no evaluation. Samples are drawn.
    """
    config = load_config(case.config, [])
    kinds = {"dit": config.dit.kind, "vae": config.vae.kind}
    if small:
        config = tiny.shrink(config, "miniature")
    with config.ignore_type():
        config.start = ""
        config.dit.remat = "full"
        config.mllm.language.remat = "none"
        if config.mllm.language.lora is not None:
            config.mllm.language.lora.dropout = 0.0
        config.train.update({"steps": STEPS, "batch": case.batch, "ema": None, "log_every": 1, "preview_every": 0})
        config.train.update({"checkpoint_every": STEPS // 2, "keep_last": 2, "accumulate": 1})
        config.train.update({"evaluate_every": 0, "keep_best": 0})
        config.train.rules = case.rules or config.train.rules
        config.mesh, config.hardware = base.section(MeshConfig()), ()
        rows: Any = config.buckets
        bucket = dict(next(row for row in rows if row["task"] == case.task), batch=case.batch, weight=1.0)
        if small:
            bucket |= _tiny_networks(config, kinds)
        if case.frames > 1:
            bucket["frames"] = tiny.FRAMES if small else case.frames
        config.buckets = (bucket,)
        kind = next(kind for kind, tasks in DRAWN.items() if case.task in tasks)
        config.sources = base.sources(SourceSection(kind, "", case.task, count=64))
        _place(config, case, folders)
    return config


def _tiny_networks(config: ConfigDict, kinds: dict[str, str]) -> dict[str, Any]:
    """Puts a published kind of autoencoder in place of the miniature's own; returns the bucket's size and batch."""
    record = registry.family("vae")[kinds["vae"]]
    vae = record.config(**record.tiny)
    config.vae = base.section(vae, kind=record.name)
    config.dit.latent_channels = record.module(vae).channels
    if config.dit.get("extra_channels"):
        config.dit.extra_channels = config.dit.latent_channels + 1
    dit = registry.family("dit")[kinds["dit"]]
    for field in dataclasses.fields(dit.config):
        if field.name == "mlp_ratio":
            config.dit.mlp_ratio = field.default  # the one that diffusers builds
    patch = dit.module(dit.config(**dit.tiny)).patch[1]
    side = tiny.GRID * patch * record.module(vae).spatial
    config.train.batch = 2
    if config.get("text") is not None:
        config.text.length = TINY_TEXT
    return {"size": (side, side), "batch": 2}


def _place(config: ConfigDict, case: Case, folders: Path) -> None:
    """Names the folders of all weights and tokenizers. A DiT that trains from scratch has none."""
    pipeline = str(folders / case.folder)
    mllm = str(folders / ("Qwen2.5-VL-3B-Instruct" if case.name == "t2i_scratch" else "Qwen2.5-VL-7B-Instruct"))
    config.mllm.weights = config.mllm.tokenizer = mllm
    config.vae_weights = f"{pipeline}/vae"
    config.dit_weights = "" if case.name == "t2i_scratch" else f"{pipeline}/transformer"
    if config.get("text") is not None:
        config.text.weights, config.text.tokenizer = f"{pipeline}/text_encoder", f"{pipeline}/tokenizer"


def setup_of(case: Case, folders: Path, small: bool) -> Experiment:
    """The experiment of a case."""
    return read.experiment(config_of(case, folders, small))
