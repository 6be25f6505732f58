"""What the registry knows of Wan2.2."""

from metacanvas_jax.dit.base import smallest_arguments
from metacanvas_jax.dit.wan import published
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.dit.wan.schedule import wan_unipc
from metacanvas_jax.dit.wan.table import added, table
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.weights.record import Network, Pipeline

RECORD = Network(
    family="dit",
    name="wan",
    config=WanConfig,
    module=Wan,
    arguments=smallest_arguments,
    tiny={
        "latent_channels": 16,
        "heads": 2,
        "head_width": 32,
        "mlp": 128,
        "layers": 2,
        "context_width": 64,
        "freq": 32,
    },
    published="WanTransformer3DModel",
    read=published.read,
    write=published.write,
    table=table,
    subfolder="transformer",
    free=("dtype", "remat", "mask_context", "extra_channels", "lora"),
    added=added,
    # `_keep_in_fp32_modules` of the reference; its `norm2` is our `cross_norm`, and its other two have no parameters.
    keep_float32=("time/.*", "table", "blocks/table", "blocks/cross_norm/.*"),
    schedules={"wan_unipc": lambda steps, shift, tokens: wan_unipc(steps, shift)},
    samplings={"UniPCMultistepScheduler": published.sampling},
    licence=lambda config: ("Wan2.2-TI2V-5B", "Apache-2.0"),
    settings={"mask_context": True},
    pipeline=Pipeline(
        steps=50,
        guidance=5.0,
        bucket=lambda config, spatial: Bucket("text_to_video", (704, 1280), frames=121, fps=24.0),
    ),
)
