"""The linear-attention block: linear attention, optional cross-attention, Mix-FFN, modulated by the time embedding.

Source: arXiv 2410.10629, section 2.2. The canvas connector uses the block too, without cross-attention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm, layer_norm, lecun_init
from metacanvas_jax.nn.lora import LoraConfig, adapted
from metacanvas_jax.nn.mix_ffn import MixFFN
from metacanvas_jax.nn.modulation import gated, modulate, table_init
from metacanvas_jax.nn.stack import entering
from metacanvas_jax.parallel.activations import constrain, constrain_grid

PROJECTIONS = ("q", "k", "v", "out", "expand", "reduce")  # layers that LoRA may adapt: of both attentions, the Mix-FFN
NORM_EPS = 1e-5  # of the q/k norms, whatever the other norms have


class LinearAttention(nn.Module):
    """ReLU linear attention among all tokens of an image; q, k and v have no bias."""

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
    """Softmax attention from image tokens to text states; every projection has a bias."""

    heads: int
    qk_norm: bool
    dtype: Dtype
    out_init: nn.initializers.Initializer = lecun_init
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b y x d"], caption: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b y x d"]:
        """``mask`` is True on the text states that are attended to."""
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


class LinearBlock(nn.Module):
    """Linear attention, cross-attention, Mix-FFN; without ``cross_heads`` there is no cross-attention.

    The input of the cross-attention is neither normalised nor modulated, and its output is added without a gate.
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
        """The modulation is the block's learned table plus ``chunks`` of the time embedding (None: the table alone)."""
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


def split_heads(x: Float[Array, "b n d"], heads: int, sequence: str = "seq") -> Float[Array, "b n h e"]:
    """Consecutive channels form a head. ``sequence`` names the token axis."""
    x = rearrange(x, "b n (h e) -> b n h e", h=heads)
    return constrain(x, ("batch", sequence, "heads", None))
