"""Autoencoders: pixels ``[b 3 t h w]`` in [-1, 1] to latents ``[b c t h w]`` as transformers read them, and back."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn


class DcAe:
    """SANA's, frame by frame."""

    spatial, temporal = 32, 1

    def __init__(self, net: AutoencoderDC):
        self.net, self.scale = net, net.config.scaling_factor
        self.spatial = 2 ** (len(net.config.encoder_block_out_channels) - 1)
        self.channels = net.config.latent_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents."""
        return per_frame(lambda x: self.net.encode(x).latent, pixels) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        return per_frame(lambda z: self.net.decode(z).sample, latents / self.scale)


class Kl:
    """FLUX's, frame by frame; the mean of the posterior."""

    temporal = 1

    def __init__(self, net: AutoencoderKL):
        self.net, self.scale, self.shift = net, net.config.scaling_factor, net.config.shift_factor or 0.0
        self.spatial = 2 ** (len(net.config.block_out_channels) - 1)
        self.channels = net.config.latent_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents."""
        return (per_frame(lambda x: self.net.encode(x).latent_dist.mode(), pixels) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        return per_frame(lambda z: self.net.decode(z).sample, latents / self.scale + self.shift)


class Wan:
    """Wan's, over all frames; the mean of the posterior, normalised by channel."""

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


class PatchPca(nn.Module):
    """The miniature's: every patch of pixels projected on its principal directions."""

    temporal = 1

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor):
        super().__init__()
        self.mean, self.basis, self.scale = (nn.Parameter(x, requires_grad=False) for x in (mean, basis, scale))
        self.spatial, self.channels = int((len(mean) // 3) ** 0.5), basis.shape[1]

    @classmethod
    def from_pretrained(cls, folder: Path) -> "PatchPca":
        """Reads an exported folder."""
        return cls(**load_file(folder / "model.safetensors"))

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents."""
        patch = self.spatial
        cut = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # b c t h i w j
        patches = cut.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)
        return ((patches - self.mean) @ (self.basis * self.scale)).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        patch = self.spatial
        patches = latents.movedim(1, -1) @ (self.basis / self.scale).T + self.mean
        cut = patches.unflatten(4, (patch, patch, 3)).permute(0, 6, 1, 2, 4, 3, 5)
        return cut.flatten(5, 6).flatten(3, 4)


def per_frame(network, x: Tensor) -> Tensor:
    """A network of images on every frame of a video."""
    frames = network(x.movedim(2, 1).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).movedim(1, 2)


VAES = {
    "dc_ae": (AutoencoderDC, DcAe),
    "kl": (AutoencoderKL, Kl),
    "wan": (AutoencoderKLWan, Wan),
}
"""Class of diffusers and its wrapper, by the kind of the config."""
