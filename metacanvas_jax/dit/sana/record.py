"""What the registry knows of SANA."""

from metacanvas_jax.dit.base import smallest_arguments
from metacanvas_jax.dit.sana import published
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.dit.sana.schedule import sana_dpm
from metacanvas_jax.dit.sana.table import table
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.weights.record import Network, Pipeline


def _sizes(config: SanaConfig, sizes: dict) -> dict:
    if config.interpolation_scale is None:  # ``sample_size`` scales positions, of which there are none
        return {name: size for name, size in sizes.items() if name != "sample_size"}
    return sizes


def _bucket(config: SanaConfig, spatial: int) -> Bucket:
    side = config.sample_size * config.patch * spatial
    return Bucket("text_to_image", (side, side))


RECORD = Network(
    family="dit",
    name="sana",
    config=SanaConfig,
    module=Sana,
    arguments=smallest_arguments,
    tiny={"latent_channels": 32, "heads": 2, "head_width": 32, "cross_heads": 2, "layers": 2, "context_width": 64},
    published="SanaTransformer2DModel",
    read=published.read,
    write=published.write,
    table=table,
    subfolder="transformer",
    free=(
        *("dtype", "remat", "unroll", "lora", "time_scale"),
        *("caption_norm_init", "zero_init_out", "predicts", "least_time"),
    ),
    sizes=_sizes,
    schedules={"sana_dpm": lambda steps, shift, tokens: sana_dpm(steps, shift)},
    samplings={"DPMSolverMultistepScheduler": published.sampling},
    licence=lambda config: ("SANA and its autoencoder", "NVIDIA's licence of the SANA weights"),
    pipeline=Pipeline(steps=20, guidance=4.5, bucket=_bucket, text_encoder=True),
)
