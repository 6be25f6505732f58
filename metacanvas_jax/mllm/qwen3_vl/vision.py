"""The vision tower of Qwen3-VL: full attention over the patches of an image, and tokens taken at several depths.

Reference: transformers ``models/qwen3_vl/modeling_qwen3_vl.py``. No block attends across temporal grids, so a video is
a batch of images here. A merger makes 2 x 2 patches one token after the last block; further mergers do so after some of
the blocks before, and their tokens are added to the first layers of the language model (DeepStack, arXiv 2406.04334).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from metacanvas_jax.kernels.attention import attention
from metacanvas_jax.mllm.vision import check_patches, patch_angles, patch_coordinates
from metacanvas_jax.nn.layers import Dense, Dtype, LayerNorm
from metacanvas_jax.nn.rope import rotate
from metacanvas_jax.nn.stack import Remat, entering, stack
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import Grid

NORM_EPS = 1e-6
positions_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower.

    ``position_side`` is the side of the square table of learned positions. ``deepstack_layers`` are the blocks, in
    ascending order, whose outputs are added to the first layers of the language model.

    Raises ValueError for sizes that do not fit together.
    """

    depth: int
    width: int
    heads: int
    mlp: int
    out_width: int
    deepstack_layers: tuple[int, ...]
    position_side: int = 48
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    in_channels: int = 3
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(f"the head width, {self.width} / {self.heads}, must be a multiple of 4 (two RoPE axes)")
        layers = self.deepstack_layers
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < self.depth:
            raise ValueError(f"deepstack_layers {layers} must ascend and lie below depth {self.depth}")

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.in_channels * self.temporal_patch * self.patch**2


def nearest_positions(
    coordinates: Int[np.ndarray, " p"], count: int, side: int
) -> tuple[Int[np.ndarray, "p 2"], Float[np.ndarray, "p 2"]]:
    """The two places of a table of ``side`` places around each coordinate of ``count``, and their weights.

    The first and the last coordinate stand at the first and the last place (``align_corners`` of torch).
    """
    places = coordinates.astype(np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
    below = np.floor(places)
    share = places - below
    around = np.minimum(np.stack([below, below + 1], axis=1).astype(np.int32), side - 1)
    return around, np.stack([1 - share, share], axis=1)


class Positions(nn.Module):
    """Learned positions on a square, interpolated to the patches of a grid."""

    config: VisionConfig

    @nn.compact
    def __call__(self, coordinates: Int[np.ndarray, "2 p"], rows: int, columns: int) -> Float[Array, "p d"]:
        """Positions in float32 of patches at these rows and columns of a grid of ``rows`` x ``columns``."""
        c = self.config
        side = c.position_side
        init = nn.with_logical_partitioning(positions_init, (None, "embed"))
        table = self.param("table", init, (side**2, c.width))
        (row, of_row), (column, of_column) = (
            nearest_positions(axis, count, side) for axis, count in zip(coordinates, (rows, columns), strict=True)
        )
        places = rearrange(row[:, :, None] * side + column[:, None], "p i j -> p (i j)")
        weights = rearrange(of_row[:, :, None] * of_column[:, None], "p i j -> p (i j) 1")
        return jnp.sum(table[places].astype(jnp.float32) * jnp.asarray(weights), axis=1)


class VisionLayer(nn.Module):
    """One transformer block over the patches of a temporal grid; it hands on what deeper layers were kept."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b p d"], Float[Array, "s b p d"]],
        place: Int[Array, ""],
        angles: Float[Array, "1 p f"],
    ):
        """``place`` is where the output is kept; the last place is overwritten and never read."""
        c, (x, kept) = self.config, carry
        x = constrain(entering(x), ("batch", "seq", "embed"))
        y = LayerNorm(NORM_EPS, name="attention_norm")(x)
        y = Dense(3 * c.width, ("embed", "heads"), c.dtype, name="qkv")(y)
        q, k, v = rearrange(y, "b p (h s e) -> s b p h e", s=3, h=c.heads)
        q, k, v = (constrain(z, ("batch", "seq", "heads", None)) for z in (q, k, v))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        y = rearrange(attention(rotate(q, cos, sin), rotate(k, cos, sin), v), "b p h e -> b p (h e)")
        x = constrain(x + Dense(c.width, ("heads", "embed"), c.dtype, name="o")(y), ("batch", "seq", "embed"))
        y = LayerNorm(NORM_EPS, name="mlp_norm")(x)
        y = nn.gelu(Dense(c.mlp, ("embed", "mlp"), c.dtype, name="up")(y), approximate=True)
        y = constrain(y, ("batch", "seq", "mlp"))
        x = constrain(x + Dense(c.width, ("mlp", "embed"), c.dtype, name="down")(y), ("batch", "seq", "embed"))
        return (x, jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)), None


class Merger(nn.Module):
    """One token of each ``merge`` x ``merge`` patches, in the width of the language model.

    ``merged_norm`` says whether the norm is over the values of all patches of a token together, or of each patch.
    """

    config: VisionConfig
    merged_norm: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b r o"]:
        """Patches of one merge unit are neighbours."""
        c = self.config
        unit = c.merge**2
        if self.merged_norm:
            x = LayerNorm(NORM_EPS, None, name="norm")(rearrange(x, "b (r u) d -> b r (u d)", u=unit))
        else:
            x = rearrange(LayerNorm(NORM_EPS, name="norm")(x), "b (r u) d -> b r (u d)", u=unit)
        x = Dense(x.shape[-1], ("embed", "mlp"), c.dtype, name="up")(x)
        x = constrain(nn.gelu(x, approximate=False), ("batch", "seq", "mlp"))
        return Dense(c.out_width, ("mlp", "embed"), c.dtype, name="down")(x)


class DeepMerger(nn.Module):
    """A merger of one depth, as a layer of a stack."""

    config: VisionConfig

    @nn.compact
    def __call__(self, carry: None, x: Float[Array, "b p d"]):
        """Tokens of the output of one block."""
        return carry, Merger(self.config, merged_norm=True, name="merger")(x)


class Vision(nn.Module):
    """Images or videos of one grid to tokens of the language model."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b p q"], grid: Grid
    ) -> tuple[Float[Array, "b r o"], Float[Array, "s b r o"]]:
        """Merged tokens in raster order (time, rows, columns), and what is added to the first layers in these places.

        ``grid`` counts patches, which are in merge-block order. Raises ValueError if patches and grid do not agree.
        """
        c, (t, h, w) = self.config, grid
        check_patches(patches.shape, grid, c.patch_values, c.merge)
        coordinates, taken = patch_coordinates(h, w, c.merge), len(c.deepstack_layers)

        x = rearrange(patches, "b (t p) q -> (b t) p q", t=t)
        x = Dense(c.width, (None, "embed"), c.dtype, name="patch")(x)
        x = x + Positions(c, name="positions")(coordinates, h, w).astype(x.dtype)[None]
        places = np.full(c.depth, taken, np.int32)  # of blocks that nothing is taken from: the place that is not read
        places[list(c.deepstack_layers)] = np.arange(taken)
        layers = stack(VisionLayer, c.depth, remat=c.remat, inputs=2, scanned=1)(c, name="layers")
        kept = jnp.zeros((taken + 1, *x.shape), x.dtype)
        (x, kept), _ = layers((x, kept), jnp.asarray(places), patch_angles(coordinates, c.width // c.heads))

        tokens = Merger(c, merged_norm=False, name="merger")(x)
        mergers = stack(DeepMerger, taken, remat=c.remat, inputs=1, scanned=1)(c, name="deepstack")
        _, added = mergers(None, kept[:taken])
        tokens = rearrange(tokens, "(b t) r o -> b (t r) o", t=t)
        return tokens, rearrange(added, "s (b t) r o -> s b (t r) o", t=t)
