"""Tiny runs of all three backbones, as a training would leave them, without any training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from qwen_support import tokenizer

from configs import base
from metacanvas_jax.config import read, schema
from metacanvas_jax.config.load import write_config
from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.data.tokenizer import save_tokenizer
from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.dit.flux import network as flux
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.flux2 import network as flux2
from metacanvas_jax.dit.flux2.network import Flux2Config
from metacanvas_jax.dit.qwen_image.network import QwenImageConfig
from metacanvas_jax.dit.sana.network import PROJECTIONS, SanaConfig
from metacanvas_jax.dit.wan import network as wan
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.exchange.export_run import Options
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.train import store
from metacanvas_jax.train.job import fingerprint, fit_config, make_job
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.train.state import new_state
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.vae.patch_pca.network import PatchPcaConfig
from metacanvas_jax.weights import saved

QUIET = Options(progress=False)
CHANNELS = 4
LENGTH = 64
LANGUAGE = LanguageConfig(
    vocab=300,
    width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=48,
    rope_sections=(2, 3, 3),
    lora=LoraConfig(rank=3, alpha=6.0, dropout=0.05),
)
VISION = VisionConfig(depth=2, width=32, heads=2, mlp=40, out_width=32, full_attention_layers=(1,), patch=14, window=56)
DITS = {
    "sana": SanaConfig(
        latent_channels=CHANNELS,
        heads=2,
        head_width=32,
        cross_heads=4,
        layers=2,
        context_width=16,
        lora=LoraConfig(rank=2, alpha=3.0, targets=PROJECTIONS),
    ),
    "flux": FluxConfig(
        latent_channels=CHANNELS,
        layers_double=1,
        layers_single=1,
        heads=4,
        head_width=16,
        context_width=16,
        pooled_width=8,
        rope_axes=(4, 6, 6),
        pooled="learned",
        guidance=False,
        mask_context=True,
        lora=LoraConfig(rank=2, alpha=3.0, targets=flux.PROJECTIONS),
    ),
    "wan": WanConfig(
        latent_channels=CHANNELS,
        extra_channels=CHANNELS + 1,
        heads=4,
        head_width=16,
        mlp=64,
        layers=2,
        context_width=16,
        freq=32,
        mask_context=True,
        lora=LoraConfig(rank=2, alpha=3.0, targets=wan.PROJECTIONS),
    ),
}
DITS["qwen_image"] = QwenImageConfig(
    latent_channels=CHANNELS,
    layers=2,
    heads=4,
    head_width=16,
    context_width=32,
    rope_axes=(4, 6, 6),
    zero_cond_t=True,
    lora=LoraConfig(rank=2, alpha=3.0, targets=("q", "k", "v", "out", "down", "modulation")),
)
DITS["flux2"] = Flux2Config(
    latent_channels=CHANNELS,
    layers_double=1,
    layers_single=1,
    heads=4,
    head_width=16,
    context_width=16,
    rope_axes=(4, 4, 4, 4),
    lora=LoraConfig(rank=2, alpha=3.0, targets=flux2.PROJECTIONS),
)
TRAINED = {
    "sana": "dit/.*",
    "flux": r"dit/(double/image/.*|pool/.*|.*_lora/.*)",
    "wan": "dit/(blocks/cross/.*|extra_in/.*|.*_lora/.*)",
}
TRAINED["qwen_image"] = TRAINED["flux2"] = "dit/.*_lora/.*"
SAMPLERS = {
    "sana": {"schedule": "sana_dpm", "method": "dpmpp_2m", "steps": 3, "shift": 3.0, "guidance": 1.5},
    "flux": {"schedule": "flux_dynamic", "method": "euler", "steps": 2, "guidance": 1.0},
    "flux2": {"schedule": "flux2_empirical", "method": "euler", "steps": 2, "guidance": 2.0},
    "qwen_image": {
        "schedule": "dynamic",
        "method": "euler",
        "steps": 3,
        "guidance": 2.0,
        "dynamic": DynamicShift(max_shift=0.9, max_tokens=8192, terminal=0.02),
        "rescale": True,
    },
    "wan": {"schedule": "wan_unipc", "method": "unipc", "steps": 4, "shift": 5.0, "guidance": 1.0},
}


def config(folder: Path, backbone: str, **changes) -> ConfigDict:
    """The config of a tiny run whose MLLM and tokenizer lie in ``folder``."""
    config = base.get_config()
    config.name = f"tiny_{backbone}"
    config.mllm = base.section(
        schema.MllmSection(LANGUAGE, VISION, image_pixels=(28 * 28, 84 * 84), buckets=(LENGTH,)),
        weights=str(folder / "qwen"),
        tokenizer=str(folder / "tokenizer"),
    )
    config.dit = base.section(DITS[backbone], kind=backbone)
    width = DITS[backbone].width
    config.vae = base.section(PatchPcaConfig(patch=6, channels=CHANNELS), kind="patch_pca")
    config.canvas = base.section(CanvasConfig(rows=2, columns=3, keyframes=2 if backbone == "wan" else 1))
    config.canvas_connector = base.section(
        CanvasConnectorConfig(width=width, vanilla_width=32, vanilla_head_width=16, vanilla_ratio=2.0)
    )
    config.context_connector = base.section(ContextConnectorConfig(out_width=16, expansion=1, out_norm=True))
    if backbone == "qwen_image":  # the MLLM's own states, after the beginning of a prompt of its own
        config.context_connector = base.section(ContextConnectorConfig, kind="identity", skip=5)
        config.mllm.update({"assistant": True, "image_label": "Picture {}: "})
    config.sampler = base.section(schema.SamplerSection(**SAMPLERS[backbone]))
    rules = (
        ("mllm/.*_lora/.*", "train"),
        ("(mllm|text|vae)/.*", "freeze"),
        (TRAINED[backbone], "train"),
        *(() if backbone == "sana" else (("dit/.*", "freeze"),)),
        (".*", "train"),
    )
    config.train = base.section(schema.TrainSection(steps=10, batch=2, rules=rules, frozen_dtype="float32"))
    config.update(changes)
    return config


def random_leaves(abstract, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values of every kind by path, of a size that keeps activations of order one; nothing is zero."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, x in sorted(flat(abstract).items()):
        noise = rng.standard_normal(x.shape, np.float32)
        name = path.rpartition("/")[2]
        if name == "scale":
            leaves[path] = 1 + np.float32(0.2) * noise
        elif name in ("kernel", "a", "b"):
            leaves[path] = noise * np.float32(x.shape[-2] ** -0.5)
        else:
            leaves[path] = np.float32(0.2) * noise
    return leaves


def save_run(run: Path, config: ConfigDict, leaves: dict[str, np.ndarray], *, step: int = 7) -> None:
    """A run's folder with one checkpoint; its moving average is ``leaves``, the raw parameters are twice that."""
    setup = read.experiment(config)
    write_config(config, run)
    average = jax.tree.map(jnp.asarray, nested(leaves))
    raw = jax.tree.map(lambda x: 2 * x, average)
    state = new_state(raw, make_optimizer(setup.optimizer))
    state = dataclasses.replace(state, ema=average, step=jnp.asarray(step, jnp.int32))
    with store.Store(run / "checkpoints") as checkpoints:
        about = fingerprint(make_job(setup), fit_config(setup))
        checkpoints.save(state, None, store.describe(about, {"mllm": "0"}))


def save_drawing_run(folder: Path, backbone: str, *buckets: Bucket, **changes) -> Path:
    """A run that draws, of which no file is missing; what it does not train is random, by its seed."""
    save_tokenizer(tokenizer(), folder / "tokenizer")
    settings = config(folder, backbone, buckets=base.buckets(*buckets), **changes)
    settings.mllm.weights = ""
    settings.vae_weights = str(save_patch_pca(folder / "pca"))
    setup = read.experiment(settings)
    job, values = make_job(setup), jax.tree.map(jnp.asarray, nested(trained_leaves(settings)))
    state = new_state(values, make_optimizer(setup.optimizer), ema=True).replace(step=jnp.asarray(7, jnp.int32))
    write_config(settings, folder / "run")
    with store.Store(folder / "run" / "checkpoints") as checkpoints:
        checkpoints.save(state, None, store.describe(fingerprint(job, fit_config(setup)), job.frozen, job.folders))
    return folder / "run"


def trained_leaves(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values of what a config trains."""
    setup = read.experiment(config)
    return random_leaves(partition(param_shapes(setup), setup.train.rules)[0], seed)


def save_qwen(folder: Path):
    """A random MLLM of transformers and its tokenizer, in ``qwen`` and ``tokenizer``; returns the model."""
    from qwen_torch_support import build as build_qwen
    from torch_support import randomize

    from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig

    model = randomize(build_qwen(MllmConfig(LANGUAGE, VISION)))
    model.save_pretrained(folder / "qwen")
    save_tokenizer(tokenizer(), folder / "tokenizer")
    return model


def save_patch_pca(folder: Path) -> Path:
    """An autoencoder of orthogonal directions, so that latents of noise become pictures that are not all clipped."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((108, CHANNELS)))[0].astype(np.float32)
    params = {"mean": np.zeros(108, np.float32), "basis": basis, "scale": np.full(CHANNELS, 0.3, np.float32)}
    saved.save(folder, params)
    return folder


def save_transformer(backbone: str, folder: Path) -> Path:
    """A random transformer of diffusers with the sizes of the tiny run."""
    from torch_support import randomize

    from metacanvas_jax import registry
    from metacanvas_jax.torch_export import sides

    config = DITS[backbone]
    cls = sides.named("dit", backbone).model
    randomize(cls.from_config(registry.of(config).write(config))).save_pretrained(folder)
    return folder


def save_text_encoder(folder: Path) -> ConfigDict:
    """A random Gemma-2 and its tokenizer; returns the section ``text`` of a config that reads them."""
    from published_support import bytes_tokenizer
    from test_gemma import build as build_gemma
    from torch_support import randomize

    sizes = {"vocab": 300, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp": 48}
    encoder = Gemma2Config(**sizes, query_scalar=24.0, window=8)
    randomize(build_gemma(encoder)).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return base.section(schema.TextSection(encoder, str(folder), str(folder), length=24))


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def is_mllm_adapter(path):
    return path.startswith("mllm/") and "_lora/" in path


def snapshot(folder):
    return sorted(path.name for path in folder.iterdir())
