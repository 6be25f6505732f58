"""The contract of a diffusion transformer, and what all of them share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.types import NOTHING, Given, Grid, States, Tokens


def smallest_arguments(config: Any) -> tuple[Array, Array, States, Given]:
    """Arguments of ``DiT.__call__`` with the fewest tokens, for ``init`` and ``eval_shape``."""
    latents, states = jnp.zeros((1, 1, 4, 4, config.latent_channels)), jnp.zeros((1, 1, config.context_width))
    return latents, jnp.ones((1,)), States(states, jnp.ones((1, 1), bool)), NOTHING


class DiT(nn.Module):
    """A velocity network in three pieces, so that the canvas can be added between the first two.

    ``unembed(run(embed(latents, time, text, given), text))`` is the velocity. The canvas connector may replace
    ``tokens.grid`` between ``embed`` and ``run``. Each network converts to its own conventions inside these methods:
    units of the timestep, order of patches, order of channels.

    ``config`` has at least ``width``, ``latent_channels`` and ``context_width`` (the width of the text states).
    ``videos`` says that latents may have several frames, ``references`` that ``Given.reference`` is read.
    """

    config: Any

    videos = False
    references = False

    @property
    def width(self) -> int:
        """Width of a patch token."""
        return self.config.width

    @property
    def patch(self) -> Grid:
        """Latents per patch token: frames, rows, columns."""
        return self.config.patch

    @property
    def given_channels(self) -> int:
        """Number of input channels for ``Given.channels``."""
        return 0

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given = NOTHING,
    ) -> Float[Array, "b t h w c"]:
        """The velocity without a canvas."""
        return self.unembed(self.run(self.embed(latents, time, text, given), text))

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Patch tokens of the noisy latents; reference latents become ``tokens.reference``.

        ``time`` is the noise level in [0, 1], per sample or, for videos, per frame. Raises ValueError for inputs that
        the network cannot use.
        """
        raise NotImplementedError

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """The transformer blocks."""
        raise NotImplementedError

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Final norm, projection and unpatchify: the velocity, noise minus data, in float32."""
        raise NotImplementedError

    def check_inputs(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, "b"] | Float[Array, "b t"], text: States
    ) -> None:
        """Raises ValueError for shapes that do not fit the network."""
        name, frames, width = type(self).__name__, latents.shape[1], text.states.shape[-1]
        self.check_latents("latents", latents)
        if time.ndim == 2 and not self.videos:
            raise ValueError(f"{name} takes one noise level per sample, not one per frame")
        if time.ndim == 2 and time.shape[1] != frames:
            raise ValueError(f"{name} got {time.shape[1]} noise levels per sample for {frames} noisy frames")
        if width != self.config.context_width:
            raise ValueError(f"{name} expects text states of width {self.config.context_width}, not {width}")

    def check_latents(self, what: str, latents: Float[Array, "b t h w c"]) -> None:
        """Raises ValueError for latents that cannot be cut into patches."""
        _, frames, rows, columns, channels = latents.shape
        fits = channels == self.config.latent_channels and not rows % self.patch[1] and not columns % self.patch[2]
        if not fits or (frames > 1 and not self.videos):
            raise ValueError(
                f"{type(self).__name__} {what} [t h w c] = {list(latents.shape[1:])}: expected "
                f"{'' if self.videos else 'one frame, '}{self.config.latent_channels} channels, and rows and columns "
                f"that are multiples of {self.patch[1:]}"
            )

    def refuse(self, given: Given, *names: str) -> None:
        """Raises ValueError if one of these fields is set."""
        for name in names:
            if jax.tree.leaves(getattr(given, name)):
                raise ValueError(f"{type(self).__name__} cannot use Given.{name}")
