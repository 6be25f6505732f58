"""DC-AE in PyTorch: ``AutoencoderDC`` of diffusers."""

from diffusers import AutoencoderDC
from torch import Tensor

from metacanvas_jax.vae.torch_side import per_frame


class Side:
    """The autoencoder, frame by frame."""

    model = AutoencoderDC
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
