"""The image autoencoder in PyTorch: ``AutoencoderKL`` of diffusers."""

from diffusers import AutoencoderKL
from torch import Tensor

from metacanvas_jax.vae.torch_side import per_frame


class Side:
    """The autoencoder, frame by frame. Latents are the mean of the posterior."""

    model = AutoencoderKL
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
