"""What DiTs of images share whose tokens are squares of latents: target and references in, velocity out."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from metacanvas_jax.dit.base import DiT
from metacanvas_jax.dit.double_stream import EPS
from metacanvas_jax.nn.layers import layer_norm
from metacanvas_jax.nn.modulation import modulate
from metacanvas_jax.parallel.activations import constrain_grid
from metacanvas_jax.types import Given, Grid, States, Tokens


def pack(latents: Float[Array, "b 1 h w c"], fold: int = 2) -> Float[Array, "b y x d"]:
    """Folds squares of latents into channels; for 2x2 the index is ``c * 4 + row * 2 + column``."""
    return rearrange(latents, "b 1 (h p) (w q) c -> b h w (c p q)", p=fold, q=fold)


def unpack(tokens: Float[Array, "b y x d"], fold: int = 2) -> Float[Array, "b 1 h w c"]:
    """Undoes ``pack``."""
    return rearrange(tokens, "b h w (c p q) -> b 1 (h p) (w q) c", p=fold, q=fold)


class PackedDiT(DiT):
    """A DiT of images with the layers ``patch_in``, ``modulation`` and ``out``. ``t`` is 1.

    A token is a square of ``fold`` x ``fold`` latents. ``Tokens.private`` has the ``vector`` that modulates the last
    norm.
    """

    references = True
    fold = 2

    @property
    def patch(self) -> Grid:
        """Latents per patch token."""
        return (1, self.fold, self.fold)

    def packed(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, "..."], text: States, given: Given
    ) -> tuple[Float[Array, "b 1 h2 w2 d"], Float[Array, "b n d"] | None, tuple[tuple[int, int], ...]]:
        """Tokens of the noisy latents and of the references, which may have other sizes, and their (rows, columns).

        Raises ValueError for inputs that the network cannot use.
        """
        self.check_inputs(latents, time, text)
        for i, z in enumerate(given.reference):
            self.check_latents(f"reference {i}", z)
        grid = constrain_grid(self.patch_in(pack(latents, self.fold))[:, None], "embed")
        images = [self.patch_in(pack(z, self.fold)) for z in given.reference]
        reference = None
        if images:
            reference = jnp.concatenate([rearrange(x, "b h w d -> b (h w) d") for x in images], axis=1)
        return grid, reference, tuple(x.shape[1:3] for x in images)

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Final norm and projection of the target tokens; float32. The published order here is scale, then shift."""
        scale, shift = jnp.split(self.modulation(jax.nn.silu(tokens.private.vector)), 2, axis=-1)
        x = modulate(layer_norm(tokens.grid[:, 0], eps=EPS), shift, scale)
        return unpack(self.out(x), self.fold).astype(jnp.float32)
