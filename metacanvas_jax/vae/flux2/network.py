"""The image autoencoder of FLUX.2: 16x16 pixels become 128 channels.

Its encoder makes 32 channels of 8x8 pixels. A latent here is a square of 2x2 of them, as the transformer reads it:
channel ``4 c + 2 row + column``, normalised with the statistics of a batch norm, which are in the published file.
Sources: diffusers 0.42.1 ``models/autoencoders/autoencoder_kl_flux2.py``, and ``pipelines/flux2`` for the statistics.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype, ones_init, zeros_init
from metacanvas_jax.vae.base import Autoencoder, per_frame
from metacanvas_jax.vae.stages import Decoder, Encoder

FOLD = 2  # means along a side of a latent


@dataclasses.dataclass(frozen=True)
class Flux2VaeConfig:
    """Shape of the network. ``channels`` are the widths of the stages from the shallowest; each has half the size.

    ``decoder_channels`` are those of the decoder where it has others. An encoder stage has ``blocks`` residual blocks
    and a decoder stage one more. ``means`` are the channels of the posterior's mean. ``quant`` and ``post_quant`` say
    whether a 1x1 convolution follows the encoder and precedes the decoder. ``eps`` is added to the variances.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] | None = None
    blocks: int = 2
    means: int = 32
    groups: int = 32
    quant: bool = True
    post_quant: bool = True
    eps: float = 1e-4
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on fields that do not fit together."""
        widths = (*self.channels, *(self.decoder_channels or ()))
        if not self.channels or any(width % self.groups for width in widths):
            raise ValueError(f"Flux2VaeConfig: channels {widths} must be multiples of groups {self.groups}")
        if self.decoder_channels is not None and len(self.decoder_channels) != len(self.channels):
            raise ValueError(
                f"Flux2VaeConfig: decoder_channels {self.decoder_channels} must be as many as channels {self.channels}"
            )
        if self.blocks < 1 or self.means < 1:
            raise ValueError(f"Flux2VaeConfig: blocks {self.blocks} and means {self.means} must be >= 1")

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return FOLD * 2 ** (len(self.channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return FOLD**2 * self.means


FLUX2_VAE = Flux2VaeConfig()
"""The network as diffusers describes it by default: 84,046,371 parameters, the 256 statistics among them."""


class Statistics(nn.Module):
    """Mean and variance ``[c]`` of every channel of a latent."""

    config: Flux2VaeConfig

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Mean and deviation in float32, in the reference's order: the root of the variance and ``eps``."""
        shape = (self.config.latent_channels,)
        mean = self.param("mean", nn.with_logical_partitioning(zeros_init, (None,)), shape).astype(jnp.float32)
        variance = self.param("variance", nn.with_logical_partitioning(ones_init, (None,)), shape).astype(jnp.float32)
        return mean, jnp.sqrt(variance + self.config.eps)


class Flux2Vae(Autoencoder):
    """The autoencoder; a video is coded frame by frame."""

    config: Flux2VaeConfig

    def setup(self) -> None:
        """Names the parts."""
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(dataclasses.replace(c, channels=c.decoder_channels or c.channels))
        self.statistics = Statistics(c)
        if c.quant:
            self.quant = Dense(2 * c.means, (None, None), c.dtype)
        if c.post_quant:
            self.post_quant = Dense(c.means, (None, None), c.dtype)

    def to_latents(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t H W c"]:
        """The mean of the posterior, folded and normalised."""

        def moments(x: jax.Array) -> jax.Array:
            y = self.encoder(x)
            return self.quant(y) if self.config.quant else y

        mean = per_frame(moments, video)[..., : self.config.means].astype(jnp.float32)
        latents = rearrange(mean, "b t (h p) (w q) c -> b t h w (c p q)", p=FOLD, q=FOLD)
        mean, deviation = (x[None, None, None, None] for x in self.statistics())
        return (latents - mean) / deviation

    def to_pixels(self, latents: Float[Array, "b t H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels that are not clamped, as in the reference."""
        mean, deviation = (x[None, None, None, None] for x in self.statistics())
        latents = latents.astype(jnp.float32) * deviation + mean
        means = rearrange(latents, "b t h w (c p q) -> b t (h p) (w q) c", p=FOLD, q=FOLD)

        def pixels(z: jax.Array) -> jax.Array:
            return self.decoder(self.post_quant(z) if self.config.post_quant else z)

        return per_frame(pixels, means)
