"""Wan's video autoencoder in PyTorch: ``AutoencoderKLWan`` of diffusers."""

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


class Side:
    """The autoencoder, over all frames. Latents are the mean of the posterior, normalised by channel."""

    model = AutoencoderKLWan

    def __init__(self, net: AutoencoderKLWan):
        self.net, self.channels = net, net.config.z_dim
        self.spatial, self.temporal = net.config.scale_factor_spatial, net.config.scale_factor_temporal
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (net.config.latents_mean, net.config.latents_std)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents."""
        return (self.net.encode(pixels).latent_dist.mode() - self.mean.to(pixels)) / self.std.to(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        return self.net.decode(latents * self.std.to(latents) + self.mean.to(latents)).sample
