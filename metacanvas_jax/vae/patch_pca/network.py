"""The miniature's autoencoder: each patch of pixels projected on its principal directions, fitted in closed form.

A white patch has the latent zero, so that an empty background is easy for the diffusion transformer.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from metacanvas_jax.nn.precision import exact
from metacanvas_jax.types import Params
from metacanvas_jax.vae.base import Autoencoder

WHITE = 1.0
_BLANK = 0.04  # a patch whose values are all this close to white (in [-1, 1]) is left out of the fit
_CHUNK = 512  # images in float64 at once


@dataclass(frozen=True)
class PatchPcaConfig:
    """``patch`` is the side in pixels, ``channels`` the directions kept.

    ``whitening`` is the power p in the channel gains ``std ** -p``: 0 keeps the spectrum of the pixels, 1 gives all
    channels the same variance. Noise hides a channel of large variance last. Raises ValueError when the patch has fewer
    values than ``channels``.
    """

    patch: int = 12
    channels: int = 64
    whitening: float = 0.5

    def __post_init__(self):
        if self.patch < 1 or not 1 <= self.channels <= self.values:
            raise ValueError(
                f"patch PCA: {self.channels} channels asked of a patch of {self.patch} x {self.patch} x 3 values"
            )
        if not 0 <= self.whitening <= 1:
            raise ValueError(f"patch PCA: whitening is {self.whitening}; expected a power in [0, 1]")

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return self.patch

    @property
    def latent_channels(self) -> int:
        """Latent channels."""
        return self.channels

    @property
    def values(self) -> int:
        """Numbers in one patch of pixels."""
        return self.patch * self.patch * 3


def to_patches(video: Float[Array, "b t H W 3"], patch: int) -> Float[Array, "b t h w v"]:
    """Cuts frames into patches of ``patch * patch * 3`` values."""
    return rearrange(video, "b t (h i) (w j) c -> b t h w (i j c)", i=patch, j=patch)


def from_patches(patches: Float[Array, "b t h w v"], patch: int) -> Float[Array, "b t H W 3"]:
    """The reverse of ``to_patches``."""
    return rearrange(patches, "b t h w (i j c) -> b t (h i) (w j) c", i=patch, j=patch)


class PatchPca(Autoencoder):
    """The autoencoder; a video is coded frame by frame. Its parameters come from ``fit``."""

    config: PatchPcaConfig

    def setup(self):
        """Owns the white level, the directions and their gains."""
        values, channels = self.config.values, self.config.channels
        self.mean = self.param(
            "mean", nn.with_logical_partitioning(nn.initializers.constant(WHITE), (None,)), (values,), jnp.float32
        )
        self.basis = self.param(
            "basis",
            nn.with_logical_partitioning(nn.initializers.orthogonal(), (None, None)),
            (values, channels),
            jnp.float32,
        )
        self.scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)), (channels,), jnp.float32
        )

    def to_latents(self, video: Float[Array, "b t H W 3"]) -> Float[Array, "b t h w c"]:
        """Patches projected on the directions, times the gains."""
        mean, basis, scale = self._parameters()
        patches = to_patches(video.astype(jnp.float32), self.config.patch)
        centred = patches - jnp.expand_dims(mean, range(4))
        return jnp.einsum("bthwv,vc->bthwc", centred, basis * scale[None], precision=exact(centred, basis))

    def to_pixels(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t H W 3"]:
        """Pixels, clipped to [-1, 1]."""
        mean, basis, scale = self._parameters()
        back = (basis / scale[None]).T
        patches = jnp.einsum("bthwc,cv->bthwv", latents.astype(jnp.float32), back, precision=exact(back))
        patches = patches + jnp.expand_dims(mean, range(4))
        return jnp.clip(from_patches(patches, self.config.patch), -1, 1)

    def _parameters(self) -> list[Any]:
        """White level, directions and gains in float32, in which they are used; a run may store them in bfloat16."""
        return [x.astype(jnp.float32) for x in (self.mean, self.basis, self.scale)]


def fit(images: UInt8[np.ndarray, "n H W 3"], config: PatchPcaConfig) -> tuple[Params, float]:
    """Parameters of ``PatchPca`` from pictures with a white background, and the PSNR in dB on their patches.

    Directions are the leading eigenvectors of the second moment around white, over all patches that are not blank;
    gains are ``std ** -whitening``, scaled so that the mean variance of the channels is 1. Signs are fixed, so the same
    pictures give the same latents. Raises ValueError when the sides do not divide by the patch or when the patches vary
    in fewer directions than ``channels``.
    """
    height, width = images.shape[1:3]
    if height % config.patch or width % config.patch:
        raise ValueError(
            f"pictures of {height} x {width} pixels do not divide into patches of {config.patch} x {config.patch}"
        )
    moment, count = np.zeros((config.values, config.values)), 0
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].astype(np.float64) / 127.5 - 1
        patches = rearrange(pixels, "n (h i) (w j) c -> (n h w) (i j c)", i=config.patch, j=config.patch) - WHITE
        patches = patches[np.abs(patches).max(axis=1) > _BLANK]
        moment += patches.T @ patches
        count += len(patches)
    if count == 0:
        raise ValueError(f"patch PCA: all patches of the {len(images)} pictures are blank")
    variances, directions = np.linalg.eigh(moment / count)
    variances, directions = variances[::-1], directions[:, ::-1]
    kept = variances[: config.channels]
    rank = int(np.sum(variances > 1e-9 * variances[0]))
    if rank < config.channels:
        raise ValueError(
            f"patch PCA: the pictures vary in {rank} directions only, too few for {config.channels} channels"
        )

    basis = directions[:, : config.channels]
    strongest = np.argmax(np.abs(basis), axis=0)
    basis = basis * np.sign(basis[strongest, np.arange(config.channels)])
    scale = kept ** (-config.whitening / 2)
    scale = scale / np.sqrt(np.mean(kept * scale**2))
    lost = max(float(variances[config.channels :].sum()), 1e-12) / config.values
    params = {
        "mean": np.full((config.values,), WHITE, np.float32),
        "basis": basis.astype(np.float32),
        "scale": scale.astype(np.float32),
    }
    return params, float(10 * np.log10(2**2 / lost))
