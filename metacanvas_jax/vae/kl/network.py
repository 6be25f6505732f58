"""The image autoencoder with a KL-regularised posterior: 8x8 pixels become 16 channels.

Source: diffusers ``AutoencoderKL`` without the 1x1 convolutions around the latents.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.vae.base import Autoencoder, per_frame
from metacanvas_jax.vae.stages import Decoder, Encoder


@dataclasses.dataclass(frozen=True)
class KlConfig:
    """Shape of the network. ``channels`` are the widths of the stages from the shallowest; each has half the size.

    An encoder stage has ``blocks`` residual blocks and a decoder stage one more. The transformer's latents are
    ``(mean - shift) * scale``.
    """

    channels: tuple[int, ...]
    blocks: int
    latent_channels: int
    groups: int
    scale: float
    shift: float
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.channels or any(width % self.groups for width in self.channels):
            raise ValueError(f"KlConfig: channels {self.channels} must be multiples of groups {self.groups}")
        if self.blocks < 1 or self.latent_channels < 1:
            raise ValueError(f"KlConfig: blocks {self.blocks} and latent_channels {self.latent_channels} must be >= 1")

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return 2 ** (len(self.channels) - 1)

    @property
    def means(self) -> int:
        """Channels of the posterior's mean."""
        return self.latent_channels


KL_F8C16 = KlConfig(channels=(128, 256, 512, 512), blocks=2, latent_channels=16, groups=32, scale=0.3611, shift=0.1159)
"""The published network of 8x8 pixels and 16 channels: 83,819,683 parameters."""


class Kl(Autoencoder):
    """The autoencoder; a video is coded frame by frame."""

    config: KlConfig

    def setup(self) -> None:
        """Encoder and decoder."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def to_latents(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t H W c"]:
        """The mean of the posterior, shifted and scaled."""
        mean = per_frame(self.encoder, video)[..., : self.channels].astype(jnp.float32)
        return (mean - self.config.shift) * self.config.scale

    def to_pixels(self, latents: Float[Array, "b t H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels that are not clamped, as in the reference."""
        latents = latents.astype(jnp.float32) / self.config.scale + self.config.shift
        return per_frame(self.decoder, latents)
