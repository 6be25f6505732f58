"""The vision tower of Qwen2.5-VL: window attention over patches, and a merger that makes 2 x 2 patches one token.

Reference: transformers ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``. No block attends across temporal grids, so a video
is a batch of images here. Windows tile the grid of merged tokens; the tower reorders tokens once so that windows of one
size are neighbours (whole windows, then those cut by the right border, the lower border and the corner). Window
attention is then a reshape and at most four dense attentions, without masks or padding.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.attention import attention
from metacanvas_jax.mllm.vision import check_patches, patch_angles, patch_coordinates
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm
from metacanvas_jax.nn.rope import rotate
from metacanvas_jax.nn.stack import Remat, entering, stack
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import Grid


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower. ``window`` is in pixels; ``full_attention_layers`` are the layers without windows.

    Raises ValueError for sizes that do not fit together.
    """

    depth: int
    width: int
    heads: int
    mlp: int
    out_width: int
    full_attention_layers: tuple[int, ...]
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    in_channels: int = 3
    norm_eps: float = 1e-6
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(f"the head width, {self.width} / {self.heads}, must be a multiple of 4 (two RoPE axes)")
        if self.window < self.patch * self.merge or self.window % (self.patch * self.merge):
            raise ValueError(
                f"window {self.window} is not a multiple of a merged token, {self.patch * self.merge} pixels"
            )
        if any(not 0 <= layer < self.depth for layer in self.full_attention_layers):
            raise ValueError(f"full_attention_layers {self.full_attention_layers} must lie below depth {self.depth}")

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.in_channels * self.temporal_patch * self.patch**2

    @property
    def window_tokens(self) -> int:
        """Merged tokens along a side of a window."""
        return self.window // (self.patch * self.merge)


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """How merged tokens of one temporal grid are reordered: ``order[i]`` is the raster number of the token at place i.

    ``groups`` lists (number of windows, merged tokens in each), in that order.
    """

    order: np.ndarray
    groups: tuple[tuple[int, int], ...]


def window_order(rows: int, columns: int, side: int) -> WindowOrder:
    """Windows of ``side`` x ``side`` over a grid of merged tokens, those of one shape next to each other."""
    raster = np.arange(rows * columns).reshape(rows, columns)
    whole_rows, whole_columns = rows - rows % side, columns - columns % side
    order, groups = [], []
    for band in (raster[:whole_rows], raster[whole_rows:]):
        for part in (band[:, :whole_columns], band[:, whole_columns:]):
            if part.size:
                height, width = min(side, part.shape[0]), min(side, part.shape[1])
                windows = rearrange(part, "(i h) (j w) -> (i j) (h w)", h=height, w=width)
                order.append(windows.reshape(-1))
                groups.append(windows.shape)
    return WindowOrder(np.concatenate(order), tuple(groups))


def window_attention(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b p h e"],
    v: Float[Array, "b p h e"],
    groups: tuple[tuple[int, int], ...],
) -> Float[Array, "b p h e"]:
    """Attention inside windows; ``groups`` lists (number of windows, patches in each), which follow one another."""
    outputs, start = [], 0
    for count, size in groups:
        stop = start + count * size
        fold = [rearrange(x[:, start:stop], "b (w s) h e -> (b w) s h e", w=count) for x in (q, k, v)]
        outputs.append(rearrange(attention(*fold), "(b w) s h e -> b (w s) h e", w=count))
        start = stop
    return jnp.concatenate(outputs, axis=1)


class VisionLayer(nn.Module):
    """One transformer block over the patches of a temporal grid, in window order."""

    config: VisionConfig
    groups: tuple[tuple[int, int], ...]  # (windows, patches in each)

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"], full: Bool[Array, ""], angles: Float[Array, "1 p f"]):
        """``full`` says whether this block attends to the whole grid."""
        c = self.config
        x = constrain(entering(x), ("batch", "seq", "embed"))
        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        y = Dense(3 * c.width, ("embed", "heads"), c.dtype, name="qkv")(y)
        q, k, v = rearrange(y, "b p (h s e) -> s b p h e", s=3, h=c.heads)
        q, k, v = (constrain(z, ("batch", "seq", "heads", None)) for z in (q, k, v))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if len(self.groups) == 1 and self.groups[0][0] == 1:  # one window holds the grid
            y = attention(q, k, v)
        else:
            y = jax.lax.cond(full, attention, lambda q, k, v: window_attention(q, k, v, self.groups), q, k, v)
        y = rearrange(y, "b p h e -> b p (h e)")
        x = constrain(x + Dense(c.width, ("heads", "embed"), c.dtype, name="o")(y), ("batch", "seq", "embed"))
        y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate = Dense(c.mlp, ("embed", "mlp"), c.dtype, name="gate")(y)
        y = nn.silu(gate) * Dense(c.mlp, ("embed", "mlp"), c.dtype, name="up")(y)
        y = constrain(y, ("batch", "seq", "mlp"))
        x = x + Dense(c.width, ("mlp", "embed"), c.dtype, name="down")(y)
        return constrain(x, ("batch", "seq", "embed")), None


class Merger(nn.Module):
    """Norm per patch, then one token of each ``merge`` x ``merge`` patches in the width of the language model."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b r o"]:
        """Patches of one merge unit are neighbours."""
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        x = rearrange(x, "b (r u) d -> b r (u d)", u=c.merge**2)
        x = Dense(x.shape[-1], ("embed", "mlp"), c.dtype, name="up")(x)
        x = constrain(nn.gelu(x, approximate=False), ("batch", "seq", "mlp"))
        return Dense(c.out_width, ("mlp", "embed"), c.dtype, name="down")(x)


class Vision(nn.Module):
    """Images or videos of one grid to tokens of the language model."""

    config: VisionConfig

    @nn.compact
    def __call__(self, patches: Float[Array, "b p q"], grid: Grid) -> tuple[Float[Array, "b r o"], None]:
        """Merged tokens in raster order (time, rows, columns); ``grid`` counts patches, which are in merge-block order.

        Nothing is added to the layers of the language model: the second result is None.

        Raises ValueError if patches and grid do not agree.
        """
        c = self.config
        check_patches(patches.shape, grid, c.patch_values, c.merge)
        (t, h, w), unit = grid, c.merge**2
        plan = window_order(h // c.merge, w // c.merge, c.window_tokens)
        coordinates = rearrange(patch_coordinates(h, w, c.merge), "two (r u) -> two r u", u=unit)[:, plan.order]
        angles = patch_angles(rearrange(coordinates, "two r u -> two (r u)"), c.width // c.heads)

        x = rearrange(patches, "b (t r u) q -> (b t) r (u q)", t=t, u=unit)[:, plan.order]
        x = rearrange(x, "b r (u q) -> b (r u) q", u=unit)
        x = Dense(c.width, (None, "embed"), c.dtype, use_bias=False, name="patch")(x)
        full = jnp.asarray(np.isin(np.arange(c.depth), c.full_attention_layers))
        groups = tuple((count, size * unit) for count, size in plan.groups)
        layers = stack(VisionLayer, c.depth, remat=c.remat, inputs=2, scanned=1)(c, groups, name="layers")
        x, _ = layers(x, full, angles)
        x = Merger(c, name="merger")(x)[:, np.argsort(plan.order)]
        return rearrange(x, "(b t) r o -> b (t r) o", t=t), None
