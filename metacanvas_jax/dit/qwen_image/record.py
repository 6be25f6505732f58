"""What the registry knows of Qwen-Image."""

from metacanvas_jax.dit.base import smallest_arguments
from metacanvas_jax.dit.qwen_image import published
from metacanvas_jax.dit.qwen_image.network import QwenImage, QwenImageConfig
from metacanvas_jax.dit.qwen_image.prompts import PROMPTS
from metacanvas_jax.dit.qwen_image.table import table
from metacanvas_jax.dit.schedulers import flow_euler
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.weights.record import Network, Pipeline

RECORD = Network(
    family="dit",
    name="qwen_image",
    config=QwenImageConfig,
    module=QwenImage,
    arguments=smallest_arguments,
    tiny={
        "latent_channels": 16,
        "layers": 2,
        "heads": 2,
        "head_width": 32,
        "context_width": 64,
        "rope_axes": (8, 12, 12),
    },
    published="QwenImageTransformer2DModel",
    read=published.read,
    write=published.write,
    table=table,
    subfolder="transformer",
    free=("dtype", "remat", "lora"),
    samplings={"FlowMatchEulerDiscreteScheduler": flow_euler},
    licence=lambda config: ("Qwen-Image", "the Apache License 2.0"),
    pipeline=Pipeline(
        steps=50,
        guidance=4.0,
        rescale=True,
        bucket=lambda config, spatial: Bucket("text_to_image", (1024, 1024)),
        prompts=PROMPTS,
    ),
)
