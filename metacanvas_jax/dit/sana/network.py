"""SANA: a text-to-image transformer with ReLU linear attention, cross-attention and Mix-FFN.

Source: "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers" (arXiv 2410.10629) and
diffusers ``models/transformers/sana_transformer.py``.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm, layer_norm, lecun_init, zeros_init
from metacanvas_jax.nn.lora import LoraConfig, adapted
from metacanvas_jax.nn.mix_ffn import MixFFN
from metacanvas_jax.nn.modulation import AdaLNSingle, gated, modulate, table_init
from metacanvas_jax.nn.stack import REMAT_CHOICES, entering, stack
from metacanvas_jax.parallel.activations import constrain, constrain_grid
from metacanvas_jax.types import Condition, Grid, Tokens

PROJECTIONS = ("q", "k", "v", "out", "expand", "reduce")  # of a block: both attentions and the Mix-FFN
NORM_EPS = 1e-5  # of the caption norm and the q/k norms; fixed, unlike ``SanaConfig.eps``


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Shape of a SANA network; the width is ``heads * head_width``.

    ``qk_norm`` "across_heads" normalises q and k over all heads together (SANA-1.5).

    ``context_width`` is the width of the text states it reads. ``interpolation_scale`` None means no positional
    embedding (512 and 1024 px: position comes from the depthwise convolutions); otherwise a fixed sine-cosine table
    made for ``sample_size`` is added. ``caption_norm_init`` is the gain a fresh network starts with (SANA trains with
    0.01). ``zero_init_out`` starts the last projection and those of the cross-attentions at zero (DiT practice for
    training from scratch). ``time_scale`` turns noise levels in [0, 1] into the network's timesteps. ``lora`` puts
    adapters, without dropout, beside the layers of the blocks whose names it targets (of ``PROJECTIONS``).
    ``unroll`` blocks are compiled apart from each other (``nn/stack.py``).
    """

    latent_channels: int
    heads: int
    head_width: int
    cross_heads: int
    layers: int
    context_width: int
    mlp_ratio: float = 2.5
    patch: int = 1
    qk_norm: str | None = None
    interpolation_scale: float | None = None
    sample_size: int = 32
    eps: float = 1e-6
    time_scale: float = 1000.0
    caption_norm_init: float = 0.01
    zero_init_out: bool = False
    lora: LoraConfig | None = None
    remat: str = "none"
    unroll: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on sizes that do not fit together."""
        if self.width % self.cross_heads:
            raise ValueError(f"SanaConfig: width {self.width} is no multiple of cross_heads {self.cross_heads}.")
        if self.qk_norm not in (None, "across_heads"):
            raise ValueError(f"SanaConfig: qk_norm must be None or 'across_heads', not {self.qk_norm!r}.")
        if self.remat not in REMAT_CHOICES:
            raise ValueError(f"SanaConfig: remat must be one of {REMAT_CHOICES}, not {self.remat!r}.")
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(f"SanaConfig: positions need a width that is a multiple of 4, not {self.width}.")
        if self.lora is not None and (unknown := set(self.lora.targets) - set(PROJECTIONS)):
            raise ValueError(f"SanaConfig: unknown LoRA targets {sorted(unknown)}; choose from {PROJECTIONS}.")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(f"SanaConfig: adapters of a DiT have no dropout, found {self.lora.dropout}.")

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
    """SANA 1.6B, 512 px (``sample_size`` matters only with positions)."""
    return dataclasses.replace(_SANA_1600M, **changes)


def sana_600m(**changes) -> SanaConfig:
    """SANA 0.6B, 512 px: narrower and deeper than the 1.6B."""
    return dataclasses.replace(dataclasses.replace(_SANA_1600M, heads=36, cross_heads=16, layers=28), **changes)


def sana_1_5_1600m(**changes) -> SanaConfig:
    """SANA-1.5 1.6B, 1024 px: SANA 1.6B with q and k normalised over all heads together."""
    base = dataclasses.replace(_SANA_1600M, qk_norm="across_heads", sample_size=32)
    return dataclasses.replace(base, **changes)


class Carried(NamedTuple):
    """``Tokens.private`` of SANA: time embedding [b d], its six chunks [b 6 d], caption states [b l d]."""

    embedded: jax.Array
    chunks: jax.Array
    caption: jax.Array


class LinearAttention(nn.Module):
    """ReLU linear attention among all tokens of an image; q, k, v without bias."""

    heads: int
    qk_norm: bool
    dtype: Dtype
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b y x d"]) -> Float[Array, "b y x d"]:
        """Tokens on their grid; order does not matter here."""
        width = x.shape[-1]
        q, k, v = (
            adapted(Dense(width, ("embed", "heads"), self.dtype, use_bias=False, name=name), x, self.lora)
            for name in "qkv"
        )
        if self.qk_norm:
            q, k = RMSNorm(NORM_EPS, "heads", name="q_norm")(q), RMSNorm(NORM_EPS, "heads", name="k_norm")(k)
        q, k, v = (split_heads(rearrange(z, "b y x d -> b (y x) d"), self.heads) for z in (q, k, v))
        out = rearrange(relu_linear_attention(q, k, v), "b n h e -> b n (h e)").reshape(x.shape)
        return adapted(Dense(width, ("heads", "embed"), self.dtype, name="out"), out, self.lora)


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to caption states, biases everywhere."""

    heads: int
    qk_norm: bool
    dtype: Dtype
    out_init: nn.initializers.Initializer = lecun_init
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b y x d"], caption: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b y x d"]:
        """``mask`` is True on the states that may be seen."""
        width = x.shape[-1]

        def project(name: str, z: jax.Array) -> jax.Array:
            return adapted(Dense(width, ("embed", "heads"), self.dtype, name=name), z, self.lora)

        q = project("q", rearrange(x, "b y x d -> b (y x) d"))
        k, v = project("k", caption), project("v", caption)
        if self.qk_norm:
            q, k = RMSNorm(NORM_EPS, "heads", name="q_norm")(q), RMSNorm(NORM_EPS, "heads", name="k_norm")(k)
        q = split_heads(q, self.heads)
        k, v = split_heads(k, self.heads, "whole_seq"), split_heads(v, self.heads, "whole_seq")
        out = attention(q, k, v, mask=MaskSpec(keys=mask))
        out = rearrange(out, "b n h e -> b n (h e)").reshape(x.shape)
        layer = Dense(width, ("heads", "embed"), self.dtype, kernel_init=self.out_init, name="out")
        return adapted(layer, out, self.lora)


class SanaBlock(nn.Module):
    """Linear attention, cross-attention, Mix-FFN; without ``cross_heads`` the middle part is left out.

    The cross-attention reads tokens that are neither normalised nor modulated, and adds to them without a gate.
    """

    heads: int
    hidden: int
    dtype: Dtype
    cross_heads: int | None = None
    qk_norm: bool = False
    eps: float = 1e-6
    cross_out_init: nn.initializers.Initializer = lecun_init
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b y x d"],
        chunks: Float[Array, "b 6 d"] | None,
        caption: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b y x d"], None]:
        """``chunks`` of the time embedding are added to the block's table; None leaves the table alone (no time)."""
        width = x.shape[-1]
        x = entering(x)
        table = self.param("table", nn.with_logical_partitioning(table_init, (None, "embed")), (6, width))[None]
        table = table.astype(jnp.float32)
        if chunks is not None:
            table = table + chunks.astype(jnp.float32)
        table = jnp.broadcast_to(table, (x.shape[0], 6, width))
        shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, i] for i in range(6))

        x = constrain_grid(x, "embed")
        y = modulate(layer_norm(x, eps=self.eps), shift1, scale1)
        reads = LinearAttention(self.heads, self.qk_norm, self.dtype, self.lora, name="attention")
        x = constrain_grid(gated(x, reads(y), gate1), "embed")
        if self.cross_heads is not None:
            cross = CrossAttention(
                self.cross_heads, self.qk_norm, self.dtype, self.cross_out_init, self.lora, name="cross"
            )
            x = constrain_grid(x + cross(x, caption, mask), "embed")
        y = modulate(layer_norm(x, eps=self.eps), shift2, scale2)
        x = gated(x, MixFFN(width, self.hidden, self.dtype, self.lora, name="ffn")(y), gate2)
        return constrain_grid(x, "embed"), None


class Sana(nn.Module):
    """The velocity network; see ``dit/base.py`` for how its three methods are used. Images only: ``t`` is 1."""

    config: SanaConfig

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.config.width

    @property
    def patch(self) -> Grid:
        """Latent cells per token."""
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
        blocks = stack(SanaBlock, c.layers, remat=c.remat, inputs=3, unroll=c.unroll)
        self.blocks = blocks(c.heads, c.hidden, c.dtype, c.cross_heads, c.qk_norm is not None, c.eps, out_init, c.lora)
        self.table = self.param("table", nn.with_logical_partitioning(table_init, (None, "embed")), (2, c.width))
        self.out = Dense(c.patch**2 * c.latent_channels, ("embed", None), c.dtype, kernel_init=out_init)

    def __call__(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, " b"], condition: Condition
    ) -> Float[Array, "b t h w c"]:
        """The velocity without a canvas."""
        return self.unembed(self.run(self.embed(latents, time, condition), condition))

    def embed(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, "b"] | Float[Array, "b t"], condition: Condition
    ) -> Tokens:
        """Patches, time embedding and caption states.

        Raises ValueError for videos, for a time per frame, for latents that do not fit the network, and for conditions
        that SANA cannot use.
        """
        c = self.config
        self._check(latents, time, condition)
        x = rearrange(latents[:, 0], "b (y p) (x q) c -> b y x (p q c)", p=c.patch, q=c.patch)
        x = constrain_grid(self.patch_in(x), "embed")
        if c.interpolation_scale is not None:
            positions = sincos_positions(x.shape[1:3], c.width, c.sample_size // c.patch, c.interpolation_scale)
            x = x + jnp.asarray(positions, x.dtype)[None]
        embedded, chunks = self.time(c.time_scale * time)
        caption = self.caption_fc2(jax.nn.gelu(self.caption_fc1(condition.context), approximate=True))
        private = Carried(embedded, chunks, self.caption_norm(caption))
        return Tokens(grid=x[:, None], time=time, private=private)

    def run(self, tokens: Tokens, condition: Condition) -> Tokens:
        """The transformer blocks."""
        x, _ = self.blocks(tokens.grid[:, 0], tokens.private.chunks, tokens.private.caption, condition.mask)
        return tokens.replace(grid=x[:, None])

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Norm modulated by the time embedding itself, projection, unpatchify; float32."""
        c = self.config
        table = self.table[None].astype(jnp.float32) + tokens.private.embedded[:, None].astype(jnp.float32)
        x = modulate(layer_norm(tokens.grid[:, 0], eps=c.eps), table[:, 0], table[:, 1])
        x = rearrange(self.out(x), "b y x (p q c) -> b (y p) (x q) c", p=c.patch, q=c.patch)
        return x[:, None].astype(jnp.float32)

    def _check(self, latents: jax.Array, time: jax.Array, condition: Condition) -> None:
        c = self.config
        _, frames, rows, columns, channels = latents.shape
        if frames != 1:
            raise ValueError(f"SANA makes images: the latents must have one frame, not {frames}.")
        if channels != c.latent_channels:
            raise ValueError(f"SANA expects latents of {c.latent_channels} channels, not {channels}.")
        if rows % c.patch or columns % c.patch:
            raise ValueError(f"SANA: a latent grid of {rows}x{columns} cannot be cut into patches of {c.patch}.")
        if time.ndim != 1:
            raise ValueError("SANA takes one noise level per sample, not one per frame.")
        if condition.context.shape[-1] != c.context_width:
            raise ValueError(f"SANA expects a context of width {c.context_width}, not {condition.context.shape[-1]}.")
        for name in ("channels", "pooled", "guidance"):
            if getattr(condition, name) is not None:
                raise ValueError(f"SANA cannot use condition.{name}.")
        if condition.reference:
            raise ValueError("SANA cannot use condition.reference.")


def split_heads(x: Float[Array, "b n d"], heads: int, sequence: str = "seq") -> Float[Array, "b n h e"]:
    """Consecutive channels form a head. ``sequence`` names the token axis."""
    x = rearrange(x, "b n (h e) -> b n h e", h=heads)
    return constrain(x, ("batch", sequence, "heads", None))


def sincos_positions(grid: tuple[int, int], width: int, base: int, scale: float) -> np.ndarray:
    """Fixed embedding ``[y x d]``: columns in the first half, rows in the second, each sines then cosines.

    Cell ``i`` of ``n`` stands at ``i * base / n / scale``. Source: diffusers ``get_2d_sincos_pos_embed``.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def axis(size: int) -> np.ndarray:
        # The library places cells in float32 and takes sines in float64.
        at = np.arange(size, dtype=np.float32) / np.float32(size / base) / np.float32(scale)
        angles = at.astype(np.float64)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = grid
    by_column = np.broadcast_to(axis(columns)[None], (rows, columns, width // 2))
    by_row = np.broadcast_to(axis(rows)[:, None], (rows, columns, width // 2))
    return np.concatenate([by_column, by_row], axis=-1).astype(np.float32)
