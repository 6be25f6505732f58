"""What every autoencoder offers, and the few operations that all three share."""

from collections.abc import Callable
from typing import Protocol

import einops
from jaxtyping import Array, Float

from metacanvas_jax.errors import UserError


class Autoencoder(Protocol):
    """Pixels to latents and back; latents are already normalised for the diffusion transformer.

    ``spatial`` and ``temporal`` are the factors between pixels and latents, ``channels`` the number of latent channels.
    A video of ``1 + temporal * k`` frames has ``1 + k`` latent frames. Latents are float32; pixels come out in the
    compute dtype of the network.
    """

    spatial: int
    temporal: int
    channels: int

    def encode(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b T H W c"]:
        """Latents of pixels in [-1, 1]: the mean of the posterior, normalised."""
        ...

    def decode(self, latents: Float[Array, "b T H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels in [-1, 1]."""
        ...


def check_video(name: str, shape: tuple[int, ...], spatial: int, temporal: int) -> None:
    """Raises ``UserError`` if an autoencoder of these factors cannot encode pixels of this shape ``[b t h w c]``."""
    _, frames, height, width, channels = shape
    if channels != 3:
        raise UserError(f"{name} expects 3 colour channels, found {channels}")
    if height % spatial or width % spatial:
        raise UserError(f"{name} expects a height and a width divisible by {spatial}, found {height}x{width}")
    if frames % temporal != 1 % temporal:
        below = (frames - 1) // temporal * temporal + 1
        raise UserError(
            f"{name} expects 1 + {temporal} k frames, found {frames} (nearest: {below} or {below + temporal})"
        )


def check_latents(name: str, shape: tuple[int, ...], channels: int) -> None:
    """Raises ``UserError`` if latents ``[b t h w c]`` have another number of channels."""
    if shape[-1] != channels:
        raise UserError(f"{name} expects latents of {channels} channels, found {shape[-1]}")


def per_frame(network: Callable[[Array], Array], x: Float[Array, "b t h w i"]) -> Float[Array, "b t H W o"]:
    """A network of images ``[n h w i]`` on every frame of a video."""
    y = network(einops.rearrange(x, "b t h w i -> (b t) h w i"))
    return einops.rearrange(y, "(b t) h w o -> b t h w o", b=x.shape[0])
