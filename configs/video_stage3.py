"""Video, stage 3: the canvas, and six tasks in one model (paper 3.3, Tables 4 to 7 and 16).

Command:   metacanvas train --config configs/video_stage3.py --workdir runs/video_stage3
           metacanvas train --config configs/video_stage3.py:keyframes_6 --workdir runs/video_stage3_keyframes_6
           metacanvas train --config configs/video_stage3.py:miniature      (seconds, on a CPU)
Variants:  keyframes_3 (the paper's choice), keyframes_1, keyframes_6, keyframes_11, keyframes_31, and keyframes_0: no
           canvas (Table 6)
Needs:     the run of stage 2 in runs/video_stage2
Data:      704 x 1280, 121 frames at 24 per second; text-to-image 5 %, image editing 15 %, text-to-video 15 %,
           image-to-video 15 %, video editing 25 %, reference-to-video 25 % (data/*, written by `metacanvas prepare`)
Trained:   DiT, connectors, canvas, adapters of rank 64 in the MLLM
Hardware:  128 TPU v5p chips (4x4x8), 16 images or 1 video per chip
Time:      at most 15 h for 10,000 steps from stored latents (expected: 5.31 s a step of videos, docs/performance.md)
Score:     VBench-I2V 87.13 (before 86.98); video editing semantics 7.91 (6.61), overall 7.56 (6.68); OmniContext-Video
           5.40. Overall score of video editing by keyframes 0/1/3/6/11/31: 6.68, 7.82, 7.56, 7.20, 7.36, 7.12; the
           canvas costs 3.1 to 3.4 % of a step
Chosen here, as the paper does not say: keyframes are spread over the clip and at least one position apart; three
reference images; given latents come as 48 input channels and a mask.
"""

from ml_collections import ConfigDict

from configs import base, tiny, video_stage2
from configs.video_stage1 import CHIPS
from configs.video_stage2 import FRAMES, SIZE, VIDEOS_ON_V6E
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.dit.wan.network import wan2_2_ti2v_5b
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.vae.wan.network import WAN22_VAE

VARIANTS = ("keyframes_3", "keyframes_0", "keyframes_1", "keyframes_6", "keyframes_11", "keyframes_31")
FPS = 24.0
FOLDERS = {
    "text_to_image": "images",
    "image_editing": "image_edits",
    "text_to_video": "videos",
    "image_to_video": "videos",
    "video_editing": "video_edits",
    "reference_to_video": "references",
}


def get_config(variant: str = "") -> ConfigDict:
    """Multi-task training with a canvas of so many keyframes."""
    name, miniature = base.choose("configs/video_stage3.py", VARIANTS, variant)
    keyframes = int(name.removeprefix("keyframes_"))
    config = video_stage2.get_config()
    config.name = f"video_stage3_{name}"
    config.start = "runs/video_stage2"
    dit = wan2_2_ti2v_5b(mask_context=True, extra_channels=WAN22_VAE.latent_channels + 1, **base.VIDEO)
    config.dit = base.section(dit, kind="wan")
    if keyframes <= 6:
        # One video per chip leaves memory for the hidden units of its blocks; more canvas tokens would take it.
        config.dit.remat = "hidden"
    if keyframes:
        # Qwen2.5-VL counts two positions per second of video. Keyframes less than one apart would share a position.
        spacing = max(1.0, 2.0 * (FRAMES - 1) / FPS / max(keyframes - 1, 1))
        config.mllm = base.qwen("7B", LoraConfig(rank=64, alpha=64.0, dropout=0.05))
        # A video has 660 canvas tokens. Their passes through the MLLM are short: gathering its 7 billion weights would
        # take longer than the pass itself, so that each chip, or the two that share a video, hold all of them. Their
        # activations take only 3 GB.
        config.mesh.whole = ("mllm",)
        config.mllm.language.remat = "none"
        config.canvas = base.section(CanvasConfig(11, 20, keyframes, spacing=spacing))
        config.canvas_connector = base.canvas_connector()
    videos = {"size": SIZE, "frames": FRAMES, "fps": FPS, "batch": CHIPS}
    config.buckets = base.buckets(
        Bucket("text_to_image", SIZE, weight=0.05),
        Bucket("image_editing", SIZE, weight=0.15, length=384),
        Bucket("text_to_video", weight=0.15, **videos),
        Bucket("image_to_video", weight=0.15, length=384, **videos),
        Bucket("video_editing", weight=0.25, length=1024, **videos),
        Bucket("reference_to_video", weight=0.25, length=768, references=3, **videos),
    )
    config.sources = base.sources(
        *(SourceSection("records", f"{base.DATA}/{name}", task, max_skips=1000) for task, name in FOLDERS.items())
    )
    config.optimizer = base.section(OptimizerConfig(learning_rate=1e-5, warmup_steps=100))
    adapters = (("mllm/.*_lora/.*", "train"),) if keyframes else ()
    rules = (*adapters, ("(mllm|vae)/.*", "freeze"), (".*", "train"))
    config.train = base.training(10_000, 16 * CHIPS, rules)
    # A v6e chip has no room for the hidden units of the DiT.
    smaller = ("--config.dit.remat=attention",) if config.dit.remat == "hidden" else ()
    config.hardware = base.hardware(
        schema.Hardware("v5p:4x4x8"), schema.Hardware("v6e:16x16", VIDEOS_ON_V6E, overrides=smaller)
    )
    return tiny.shrink(config, miniature) if miniature else config
