"""FLUX.2's autoencoder in PyTorch: ``AutoencoderKLFlux2`` of diffusers."""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

from metacanvas_jax.vae.torch_side import per_frame

FOLD = 2  # means along a side of a latent


class Side:
    """The autoencoder, frame by frame. Latents are the mean of the posterior, folded and normalised."""

    model = AutoencoderKLFlux2
    temporal = 1

    def __init__(self, net: AutoencoderKLFlux2):
        self.net: Any = net  # torch's types allow a batch norm without statistics
        self.spatial = FOLD * 2 ** (len(net.config.block_out_channels) - 1)
        self.channels = FOLD**2 * net.config.latent_channels

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every channel, on the device and in the dtype of ``x``."""
        mean, variance = (y.view(1, -1, 1, 1) for y in (self.net.bn.running_mean, self.net.bn.running_var))
        return mean.to(x), torch.sqrt(variance + self.net.config.batch_norm_eps).to(x)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents."""

        def coded(x: Tensor) -> Tensor:
            z = F.pixel_unshuffle(self.net.encode(x).latent_dist.mode(), FOLD)
            mean, deviation = self.statistics(z)
            return (z - mean) / deviation

        return per_frame(coded, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""

        def decoded(z: Tensor) -> Tensor:
            mean, deviation = self.statistics(z)
            return self.net.decode(F.pixel_shuffle(z * deviation + mean, FOLD)).sample

        return per_frame(decoded, latents)
