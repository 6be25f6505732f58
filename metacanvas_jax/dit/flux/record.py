"""What the registry knows of FLUX.1."""

from typing import Any

import jax.numpy as jnp

from metacanvas_jax.dit.base import smallest_arguments
from metacanvas_jax.dit.flux import published
from metacanvas_jax.dit.flux.network import Flux, FluxConfig
from metacanvas_jax.dit.flux.schedule import flux_dynamic
from metacanvas_jax.dit.flux.table import added, table
from metacanvas_jax.dit.schedulers import flow_euler
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.types import Given
from metacanvas_jax.weights.record import Network, Pipeline


def _arguments(config: FluxConfig) -> tuple[Any, ...]:
    given = Given(
        pooled=jnp.zeros((1, config.pooled_width)) if config.pooled == "given" else None,
        guidance=jnp.ones((1,)) if config.guidance else None,
    )
    return (*smallest_arguments(config)[:-1], given)


RECORD = Network(
    family="dit",
    name="flux",
    config=FluxConfig,
    module=Flux,
    arguments=_arguments,
    tiny={
        "latent_channels": 16,
        "layers_double": 1,
        "layers_single": 1,
        "heads": 2,
        "head_width": 32,
        "context_width": 64,
        "pooled_width": 16,
        "rope_axes": (8, 12, 12),
    },
    published="FluxTransformer2DModel",
    read=published.read,
    write=published.write,
    table=table,
    subfolder="transformer",
    free=("dtype", "remat", "pooled", "mask_context", "lora"),
    added=added,
    schedules={"flux_dynamic": lambda steps, shift, tokens: flux_dynamic(steps, tokens)},
    samplings={"FlowMatchEulerDiscreteScheduler": flow_euler},
    licence=lambda config: ("FLUX.1-Kontext-dev", "FLUX.1 [dev] Non-Commercial License"),
    settings={"pooled": "learned", "mask_context": True},
    pipeline=Pipeline(
        steps=28,
        guidance=1.0,
        bucket=lambda config, spatial: Bucket("text_to_image", (1024, 1024)),
        dit_guidance=3.5,
    ),
)
