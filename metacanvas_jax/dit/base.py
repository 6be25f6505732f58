"""What every diffusion transformer offers, so that connectors and samplers never know which one they serve."""

from typing import Protocol

from jaxtyping import Array, Float

from metacanvas_jax.types import Condition, Grid, Tokens


class DiT(Protocol):
    """A velocity network cut at the two places where MetaCanvas enters.

    ``unembed(run(embed(latents, time, condition), condition))`` is the velocity. Between ``embed`` and ``run`` the
    canvas connector may replace ``tokens.grid``. Each backbone converts at its own door: timestep units, packing order,
    channel order.
    """

    width: int
    patch: Grid

    def embed(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, "b"] | Float[Array, "b t"], condition: Condition
    ) -> Tokens:
        """Patchifies the noisy latents; reference latents become ``tokens.reference``. ``time`` is the noise level."""
        ...

    def run(self, tokens: Tokens, condition: Condition) -> Tokens:
        """The transformer blocks."""
        ...

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Final norm, projection and unpatchify: the velocity, noise minus data, in the shape of the latents."""
        ...
