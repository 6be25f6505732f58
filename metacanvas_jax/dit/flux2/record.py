"""What the registry knows of FLUX.2."""

from metacanvas_jax.dit.base import smallest_arguments
from metacanvas_jax.dit.flux2 import published
from metacanvas_jax.dit.flux2.network import Flux2, Flux2Config
from metacanvas_jax.dit.flux2.schedule import flux2_empirical
from metacanvas_jax.dit.flux2.table import table
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.weights.record import Network, Pipeline


def _licence(config: Flux2Config) -> tuple[str, str]:
    if config.width == Flux2Config().width:
        return "FLUX.2-klein-4B", "the Apache License 2.0"
    return "FLUX.2", "FLUX Non-Commercial License"


RECORD = Network(
    family="dit",
    name="flux2",
    config=Flux2Config,
    module=Flux2,
    arguments=smallest_arguments,
    tiny={
        "latent_channels": 64,
        "layers_double": 1,
        "layers_single": 1,
        "heads": 2,
        "head_width": 32,
        "context_width": 64,
        "rope_axes": (8, 8, 8, 8),
    },
    published="Flux2Transformer2DModel",
    read=published.read,
    write=published.write,
    table=table,
    subfolder="transformer",
    free=("dtype", "remat", "lora"),
    schedules={"flux2_empirical": lambda steps, shift, tokens: flux2_empirical(steps, tokens)},
    samplings={"FlowMatchEulerDiscreteScheduler": published.sampling},
    licence=_licence,
    pipeline=Pipeline(
        steps=50,
        guidance=4.0,
        bucket=lambda config, spatial: Bucket("text_to_image", (1024, 1024)),
        text_encoder=True,
        text_length=512,
        indexed=lambda index: {"steps": 4, "guidance": 1.0} if index.get("is_distilled") else {},
    ),
)
