"""Editing and video in miniature, with and without a canvas: edits of OpenMoji scenes, and drawings that move.

Command:   python benchmarks/evidence.py           (what is missing of all runs; hours on a CPU)
           metacanvas train --config configs/evidence_tasks.py:edit_canvas --workdir runs/evidence/edit_canvas
Variants:  edit_canvas, edit_text               image editing by FLUX's architecture (Kontext), with and without canvas
           motion_0, motion_1, motion_3, motion_5   text-to-video and video editing by Wan's, by keyframes; 0: no canvas
Hardware:  2 CPU cores

The DiT reads the states of a text encoder that was taught to tell what instructions and motions say
(benchmarks/evidence_text.py). The MLLM is the one that ships. It was never taught an instruction or a motion: as in the
paper's runs of these tasks, adapters on the canvas tokens learn with the canvas.
"""

from ml_collections import ConfigDict

from configs import base, evidence, miniature
from metacanvas_jax.config import schema
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.patch_pca.network import PatchPcaConfig

EDIT, MOTION = ("edit_canvas", "edit_text"), ("motion_0", "motion_1", "motion_3", "motion_5")
VARIANTS = (*EDIT, *MOTION)
TEXT = f"{miniature.CACHE}/text_tasks"
INSTRUCTION, CAPTION = 18, 28  # tokens of the longest instruction and of the longest prompt of a video, and two more
FRAMES = 5
STEPS = 2000


def get_config(variant: str = "edit_canvas") -> ConfigDict:
    """Image editing, or text-to-video and video editing, with a canvas of so many keyframes or none."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/evidence_tasks.py has the variants {', '.join(VARIANTS)}, not {variant!r}")
    config = miniature.get_config("text")
    config.name = f"evidence_{variant}"
    config.context_connector = None
    config.text = evidence.text_encoder(TEXT, INSTRUCTION if variant in EDIT else CAPTION)
    (editing if variant in EDIT else motion)(config)
    keyframes = {"edit_canvas": 1, "edit_text": 0}[variant] if variant in EDIT else int(variant[-1])
    adapters: tuple[tuple[str, str], ...] = ()
    if keyframes:
        config.canvas = base.section(CanvasConfig(rows=4, columns=4, keyframes=keyframes))
        config.canvas.start = miniature.CELLS * keyframes
        config.canvas_connector = base.section(CanvasConnectorConfig, vanilla_ratio=2.0, mlp_ratio=1.5)
        with config.ignore_type():
            config.mllm.language.lora = base.section(LoraConfig(rank=32, alpha=32.0))
        adapters = (("mllm/.*_lora/.*", "train"),)
    else:
        config.mllm.context_memory = 0.0  # nothing reads the MLLM
    config.optimizer.update({"learning_rate": 2e-3, "total_steps": STEPS})
    config.train.rules = (*adapters, ("(mllm|text|vae)/.*", "freeze"), (".*", "train"))
    config.train.steps = STEPS
    config.train.preview_every = 0
    config.train.evaluate_every = STEPS // 5
    config.eval = base.section(schema.EvalSection(evaluators=("tasks",), samples=200, during_training=50))
    return config


def editing(config: ConfigDict) -> None:
    """FLUX.1-Kontext's architecture: the source picture's latents are tokens beside those of the target."""
    # FLUX packs 2 x 2 latents into a token. 16 tokens of 16 x 16 pixels make a picture.
    world = dict(config.world) | {"size": 64, "patch": 16, "cell": 32, "sprite": 30}
    config.world = ConfigDict(world)
    config.dit = base.section(
        FluxConfig(
            latent_channels=24,
            layers_double=3,
            layers_single=2,
            heads=4,
            head_width=32,
            mlp_ratio=2,
            context_width=128,
            pooled_width=16,
            guidance=False,
            rope_axes=(8, 12, 12),
            pooled="learned",
            mask_context=True,
        ),
        kind="flux",
    )
    config.vae = base.section(PatchPcaConfig(patch=8, channels=24), kind="patch_pca")
    config.vae_weights = f"{miniature.CACHE}/vae_edits"
    config.buckets = base.buckets(Bucket("image_editing", (64, 64), length=INSTRUCTION + 32))
    config.sources = base.sources(SourceSection("edits", task="image_editing", count=20_000))
    config.data.caption_dropout = 0.0
    config.train.batch = 32
    config.sampler.guidance = 1.0


def motion(config: ConfigDict) -> None:
    """Wan's architecture: text-to-video, and video editing with the source's latents as input channels."""
    config.dit = base.section(
        WanConfig(
            latent_channels=64,
            extra_channels=65,
            heads=4,
            head_width=32,
            mlp=256,
            layers=4,
            context_width=128,
            freq=64,
            patch=(1, 1, 1),
            mask_context=True,
        ),
        kind="wan",
    )
    config.vae_weights = f"{miniature.CACHE}/vae_motion"
    config.mllm.video_pixels = (60 * 60, 60 * 60)  # one token for each cell of a frame
    clip = {"size": (60, 60), "frames": FRAMES, "fps": 4.0}
    config.buckets = base.buckets(
        Bucket("text_to_video", weight=0.5, length=CAPTION + 12, **clip),
        Bucket("video_editing", weight=0.5, length=CAPTION + 36, **clip),
    )
    tasks = ("text_to_video", "video_editing")
    config.sources = base.sources(*(SourceSection("animations", task=task, count=20_000) for task in tasks))
    config.data.caption_dropout = 0.1
    config.train.batch = 12
