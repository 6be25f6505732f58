"""Weights of FLUX.2's autoencoder: diffusers ``AutoencoderKLFlux2``, subfolder ``vae``."""

from metacanvas_jax.vae import stage_names
from metacanvas_jax.vae.flux2.network import Flux2VaeConfig
from metacanvas_jax.weights.table import POINTWISE, SAME, Entry, linear

IGNORE = ("bn.num_batches_tracked",)  # how long the statistics were collected


def table(config: Flux2VaeConfig) -> list[Entry]:
    """Every tensor of the published file but those of ``IGNORE``; paths are relative to the network's parameters."""
    entries = stage_names.table(config, config.decoder_channels)
    for name, there in (("quant", config.quant), ("post_quant", config.post_quant)):
        if there:
            entries += linear(f"{name}_conv", name, kernel=POINTWISE)
    statistics = (("running_mean", "mean"), ("running_var", "variance"))
    return [*entries, *(Entry(f"bn.{theirs}", f"statistics/{ours}", SAME) for theirs, ours in statistics)]
