"""SANA: a text-to-image transformer with ReLU linear attention, cross-attention and Mix-FFN.

Source: "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers" (arXiv 2410.10629) and
diffusers ``models/transformers/sana_transformer.py``.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from metacanvas_jax.diffusion.flow import expand_time
from metacanvas_jax.dit.base import DiT
from metacanvas_jax.dit.blocks import NORM_EPS, PROJECTIONS, LinearBlock
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm, layer_norm, lecun_init, zeros_init
from metacanvas_jax.nn.lora import LoraConfig, check_targets
from metacanvas_jax.nn.modulation import AdaLNSingle, modulate, table_init
from metacanvas_jax.nn.stack import Remat, stack
from metacanvas_jax.parallel.activations import constrain_grid
from metacanvas_jax.types import Given, Grid, States, Tokens


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Shape of a SANA network; the width is ``heads * head_width``.

    ``qk_norm`` "across_heads" normalises q and k over all heads together (SANA-1.5).

    ``context_width`` is the width of the text states it reads. ``interpolation_scale`` None means no positional
    embedding (512 and 1024 px: position comes from the depthwise convolutions); otherwise a fixed sine-cosine table
    made for ``sample_size`` is added. ``caption_norm_init`` is the gain that a new network starts with (0.01 in the
    paper). ``zero_init_out`` starts the last projection and the output of the cross-attentions at zero, as is usual
    when a DiT is trained from scratch. ``time_scale`` turns noise levels in [0, 1] into the network's timesteps.
    ``predicts`` is what the last projection gives: the "velocity", as in the paper, or the "data" ``x``. In that case
    the velocity is ``(z - x) / t`` with a noise level ``t`` of at least ``least_time`` (arXiv 2511.13720).
    ``lora`` adds adapters, without dropout, to the layers of the blocks that it targets (of ``PROJECTIONS``).
    ``unroll`` is that of ``nn/stack.py``.
    """

    latent_channels: int
    heads: int
    head_width: int
    cross_heads: int
    layers: int
    context_width: int
    mlp_ratio: float = 2.5
    patch: int = 1
    qk_norm: Literal["across_heads"] | None = None
    interpolation_scale: float | None = None
    sample_size: int = 32
    eps: float = 1e-6
    time_scale: float = 1000.0
    caption_norm_init: float = 0.01
    zero_init_out: bool = False
    predicts: Literal["velocity", "data"] = "velocity"
    least_time: float = 0.05
    lora: LoraConfig | None = None
    remat: Remat = "none"
    unroll: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on sizes that do not fit together."""
        if self.width % self.cross_heads:
            raise ValueError(f"SanaConfig: width {self.width} is no multiple of cross_heads {self.cross_heads}.")
        if not 0 < self.least_time <= 1:
            raise ValueError(f"SanaConfig: least_time must lie in (0, 1], not {self.least_time}.")
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(f"SanaConfig: positions need a width that is a multiple of 4, not {self.width}.")
        check_targets(self.lora, PROJECTIONS, "SanaConfig")

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """Channels of one half of the Mix-FFN."""
        return int(self.mlp_ratio * self.width)


_SANA_1600M = SanaConfig(
    latent_channels=32, heads=70, head_width=32, cross_heads=20, layers=20, context_width=2304, sample_size=16
)


def sana_1600m(**changes) -> SanaConfig:
    """SANA 1.6B, 512 px (``sample_size`` has an effect only with positions)."""
    return dataclasses.replace(_SANA_1600M, **changes)


def sana_600m(**changes) -> SanaConfig:
    """SANA 0.6B, 512 px: narrower and deeper than the 1.6B."""
    return dataclasses.replace(dataclasses.replace(_SANA_1600M, heads=36, cross_heads=16, layers=28), **changes)


def sana_1_5_1600m(**changes) -> SanaConfig:
    """SANA-1.5 1.6B, 1024 px: SANA 1.6B with q and k normalised over all heads together."""
    base = dataclasses.replace(_SANA_1600M, qk_norm="across_heads", sample_size=32)
    return dataclasses.replace(base, **changes)


class Carried(NamedTuple):
    """``Tokens.private`` of SANA: time embedding [b d], its six chunks [b 6 d], caption states [b l d].

    ``latents`` [b t h w c] are the noisy latents, for a network that predicts data.
    """

    embedded: jax.Array
    chunks: jax.Array
    caption: jax.Array
    latents: jax.Array | None = None


class Sana(DiT):
    """The velocity network. Images only: ``t`` is 1."""

    config: SanaConfig

    @property
    def patch(self) -> Grid:
        """Latents per patch token."""
        return (1, self.config.patch, self.config.patch)

    def setup(self) -> None:
        """The blocks are one module, scanned over the layers."""
        c = self.config
        out_init = zeros_init if c.zero_init_out else lecun_init
        self.patch_in = Dense(c.width, (None, "embed"), c.dtype)
        self.time = AdaLNSingle(c.width, c.dtype)
        self.caption_fc1 = Dense(c.width, ("embed", "mlp"), c.dtype)
        self.caption_fc2 = Dense(c.width, ("mlp", "embed"), c.dtype)
        self.caption_norm = RMSNorm(NORM_EPS, scale_init=nn.initializers.constant(c.caption_norm_init))
        blocks = stack(LinearBlock, c.layers, remat=c.remat, inputs=3, unroll=c.unroll)
        self.blocks = blocks(c.heads, c.hidden, c.dtype, c.cross_heads, c.qk_norm is not None, c.eps, out_init, c.lora)
        self.table = self.param("table", nn.with_logical_partitioning(table_init, (None, "embed")), (2, c.width))
        self.out = Dense(c.patch**2 * c.latent_channels, ("embed", None), c.dtype, kernel_init=out_init)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Patch tokens; ``Tokens.private`` holds the time embedding and the caption states."""
        c = self.config
        self.check_inputs(latents, time, text)
        self.refuse(given, "reference", "channels", "pooled", "guidance")
        x = rearrange(latents[:, 0], "b (y p) (x q) c -> b y x (p q c)", p=c.patch, q=c.patch)
        x = constrain_grid(self.patch_in(x), "embed")
        if c.interpolation_scale is not None:
            positions = sincos_positions(x.shape[1:3], c.width, c.sample_size // c.patch, c.interpolation_scale)
            x = x + jnp.asarray(positions, x.dtype)[None]
        embedded, chunks = self.time(c.time_scale * time)
        caption = self.caption_fc2(jax.nn.gelu(self.caption_fc1(text.states), approximate=True))
        noisy = latents if c.predicts == "data" else None
        private = Carried(embedded, chunks, self.caption_norm(caption), noisy)
        return Tokens(grid=x[:, None], time=time, private=private)

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """The transformer blocks."""
        x, _ = self.blocks(tokens.grid[:, 0], tokens.private.chunks, tokens.private.caption, text.mask)
        return tokens.replace(grid=x[:, None])

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Norm modulated by the time embedding itself, projection, unpatchify; float32."""
        c = self.config
        table = self.table[None].astype(jnp.float32) + tokens.private.embedded[:, None].astype(jnp.float32)
        x = modulate(layer_norm(tokens.grid[:, 0], eps=c.eps), table[:, 0], table[:, 1])
        x = rearrange(self.out(x), "b y x (p q c) -> b (y p) (x q) c", p=c.patch, q=c.patch)
        out = x[:, None].astype(jnp.float32)
        if c.predicts == "velocity":
            return out
        time = jnp.maximum(tokens.time.astype(jnp.float32), c.least_time)
        return (tokens.private.latents.astype(jnp.float32) - out) / expand_time(time, out.ndim)


def sincos_positions(grid: tuple[int, int], width: int, base: int, scale: float) -> np.ndarray:
    """Fixed embedding ``[y x d]``: columns in the first half, rows in the second, each sines then cosines.

    Cell ``i`` of ``n`` has position ``i * base / n / scale``. Source: diffusers ``get_2d_sincos_pos_embed``.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def axis(size: int) -> np.ndarray:
        # The reference computes positions in float32 and sines in float64.
        at = np.arange(size, dtype=np.float32) / np.float32(size / base) / np.float32(scale)
        angles = at.astype(np.float64)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = grid
    by_column = np.broadcast_to(axis(columns)[None], (rows, columns, width // 2))
    by_row = np.broadcast_to(axis(rows)[:, None], (rows, columns, width // 2))
    return np.concatenate([by_column, by_row], axis=-1).astype(np.float32)
