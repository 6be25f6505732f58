"""Video, stage 2: high resolution and motion; the cross-attention of the DiT trains as well (paper, Table 16).

Command:   metacanvas train --config configs/video_stage2.py --workdir runs/video_stage2
Needs:     the run of stage 1 in runs/video_stage1
Data:      704 x 1280; text-to-image 16 %, reconstruction 4 %, text-to-video 80 % (121 frames, 24 per second) from
           data/images and data/videos, written by `metacanvas prepare`
Trained:   context connector, cross-attention of the DiT
Hardware:  128 TPU v5p chips (4x4x8), 32 images or 3 videos per chip
Time:      at most 57 h for 15,000 steps from stored latents (expected: 13.7 s a step of videos, docs/performance.md)
Score:     none of its own; stage 3 starts from it
"""

from ml_collections import ConfigDict

from configs import base, tiny, video_stage1
from configs.video_stage1 import CHIPS
from metacanvas_jax.config import schema
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.tasks import Bucket

VARIANTS = ("full",)
SIZE = (704, 1280)
FRAMES = 121
# A video does not fit the memory of one v6e chip, so that two neighbours share its tokens. Each of 64 chips holds 48
# rows of the weights. That is a multiple of 16: gradients are summed by reduce-scatters.
VIDEOS_ON_V6E = "data=4,fsdp=32,context=2"


def get_config(variant: str = "") -> ConfigDict:
    """High resolution."""
    _, miniature = base.choose("configs/video_stage2.py", VARIANTS, variant)
    config = video_stage1.get_config()
    config.name = "video_stage2"
    config.start = "runs/video_stage1"
    config.dit.remat = base.VIDEO["remat"]
    config.buckets = base.buckets(
        Bucket("text_to_image", SIZE, weight=0.16),
        Bucket("reconstruction", SIZE, weight=0.04),
        Bucket("text_to_video", SIZE, FRAMES, batch=3 * CHIPS, weight=0.8),
    )
    images = (SourceSection("records", f"{base.DATA}/images", task, max_skips=1000) for task in video_stage1.TASKS)
    videos = SourceSection("records", f"{base.DATA}/videos", "text_to_video", max_skips=1000)
    config.sources = base.sources(*images, videos)
    config.optimizer = base.section(OptimizerConfig(learning_rate=2e-5, warmup_steps=100))
    rules = (("context_connector/.*|dit/blocks/cross/.*", "train"), (".*", "freeze"))
    config.train = base.training(15_000, 32 * CHIPS, rules)
    config.hardware = base.hardware(schema.Hardware("v5p:4x4x8"), schema.Hardware("v6e:16x16", VIDEOS_ON_V6E))
    return tiny.shrink(config, miniature) if miniature else config
