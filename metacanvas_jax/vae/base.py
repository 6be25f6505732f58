"""The contract of an autoencoder, and what all of them share."""

from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.activations import part


def smallest_arguments(config: Any) -> tuple[Array]:
    """The smallest picture that an autoencoder encodes, for ``init`` and ``eval_shape``."""
    return (jnp.zeros((1, 1, config.spatial, config.spatial, 3)),)


class Autoencoder(nn.Module):
    """Pixels to latents and back; latents are already normalised for the diffusion transformer.

    A video of ``1 + temporal * k`` frames has ``1 + k`` latent frames. Latents are float32; pixels come out in the
    compute dtype of the network. A network defines ``to_latents`` and ``to_pixels``. ``config`` has at least
    ``spatial`` and ``latent_channels``.
    """

    config: Any

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return self.config.spatial

    @property
    def temporal(self) -> int:
        """Frames per latent frame after the first one; with 1, frames are encoded one by one."""
        return 1

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.latent_channels

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
        """Encodes and decodes; ``init`` makes every parameter with it."""
        return self.decode(self.encode(video))

    @part("vae")
    def encode(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b T H W c"]:
        """Latents of pixels in [-1, 1]: the mean of the posterior, normalised.

        Raises UserError for a video whose frames or sides cannot be encoded.
        """
        _, frames, height, width, colours = video.shape
        name, factor = type(self).__name__, self.temporal
        if colours != 3:
            raise UserError(f"{name} expects 3 colour channels, found {colours}")
        if height % self.spatial or width % self.spatial:
            raise UserError(f"{name} expects a height and a width divisible by {self.spatial}, found {height}x{width}")
        if frames % factor != 1 % factor:
            below = (frames - 1) // factor * factor + 1
            raise UserError(
                f"{name} expects 1 + {factor} k frames, found {frames} (nearest: {below} or {below + factor})"
            )
        return self.to_latents(video)

    @part("vae")
    def decode(self, latents: Float[Array, "b T H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels, nearly in [-1, 1]. Raises UserError for latents of another number of channels."""
        name, found = type(self).__name__, latents.shape[-1]
        if found != self.channels:
            raise UserError(f"{name} expects latents of {self.channels} channels, found {found}")
        return self.to_pixels(latents)

    def to_latents(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b T H W c"]:
        """``encode`` for a video that fits."""
        raise NotImplementedError

    def to_pixels(self, latents: Float[Array, "b T H W c"]) -> Float[Array, "b t h w 3"]:
        """``decode`` for latents that fit."""
        raise NotImplementedError


def per_frame(network: Callable[[Array], Array], x: Float[Array, "b t h w i"]) -> Float[Array, "b t H W o"]:
    """Runs a network of images ``[n h w i]`` on every frame of a video."""
    y = network(einops.rearrange(x, "b t h w i -> (b t) h w i"))
    return einops.rearrange(y, "(b t) h w o -> b t h w o", b=x.shape[0])
