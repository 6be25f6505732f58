"""Gemma-2 as a text encoder.

Source: transformers ``models/gemma2/modeling_gemma2.py`` (eager attention: the soft cap forbids a fused one).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.nn.layers import Dense, Dtype, rms_norm, zeros_init
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.nn.rope import inverse_frequencies, rotate
from metacanvas_jax.parallel.activations import constrain, part
from metacanvas_jax.text.base import TextEncoder
from metacanvas_jax.text.prompts import first_and_last
from metacanvas_jax.types import States, Text


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Sizes of a Gemma-2 decoder; the defaults are Gemma-2-2b.

    Scores are multiplied by ``query_scalar ** -0.5`` and capped at ``softcap``; even layers see the last ``window``
    tokens only. Raises ValueError for heads that do not fit together.
    """

    vocab: int = 256000
    width: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 256
    mlp: int = 9216
    query_scalar: float = 256.0
    softcap: float = 50.0
    window: int = 4096
    theta: float = 10000.0
    eps: float = 1e-6
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Checks the heads."""
        if self.heads % self.kv_heads or self.head_width % 2:
            raise ValueError(
                f"Gemma2Config: {self.heads} heads must be a multiple of {self.kv_heads} kv_heads, "
                f"and head_width {self.head_width} even."
            )


def capped_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n g e"],
    v: Float[Array, "b n g e"],
    mask: Bool[Array, "b n n"],
    scale: float,
    cap: float,
) -> Float[Array, "b n h e"]:
    """Softmax attention whose scores pass through ``cap * tanh(score / cap)``; scores and softmax are float32.

    The mask is dense: prompts are a few hundred tokens.
    """
    q = rearrange(q, "b n (g r) e -> b n g r e", g=k.shape[2])
    product = functools.partial(jnp.einsum, precision=exact(q, k))
    scores = scale * product("bngre,bmge->bgrnm", q, k, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = product("bgrnm,bmge->bngre", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return rearrange(out, "b n g r e -> b n (g r) e")


class Norm(nn.Module):
    """RMS norm with gain ``1 + scale``, multiplied in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(zeros_init, ("embed",)), (x.shape[-1],))
        y = rms_norm(x.astype(jnp.float32), 1.0 + scale.astype(jnp.float32), self.eps)
        return y.astype(x.dtype)


class Layer(nn.Module):
    """Attention and gated feed-forward, each with a norm before and after it."""

    config: Gemma2Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        sliding: Bool[Array, ""],
        cos: Float[Array, "b n f"],
        sin: Float[Array, "b n f"],
        mask: Bool[Array, "b n n"],
        window: Bool[Array, "b n n"],
    ) -> tuple[Float[Array, "b n d"], None]:
        """``sliding`` chooses the mask of the window."""
        c = self.config

        def heads(y: jax.Array, name: str, count: int, axis: str) -> jax.Array:
            y = Dense(count * c.head_width, ("embed", axis), c.dtype, use_bias=False, name=name)(y)
            y = rearrange(y, "b n (h e) -> b n h e", h=count)
            return constrain(y, ("batch", "seq", axis, None))

        y = Norm(c.eps, name="norm1")(x)
        q = rotate(heads(y, "q", c.heads, "heads"), cos, sin)
        k = rotate(heads(y, "k", c.kv_heads, "kv_heads"), cos, sin)
        v = heads(y, "v", c.kv_heads, "kv_heads")
        y = capped_attention(q, k, v, jnp.where(sliding, window, mask), c.query_scalar**-0.5, c.softcap)
        y = Dense(c.width, ("heads", "embed"), c.dtype, use_bias=False, name="o")(rearrange(y, "b n h e -> b n (h e)"))
        x = x + Norm(c.eps, name="norm2")(y)

        y = Norm(c.eps, name="norm3")(x)
        gate = Dense(c.mlp, ("embed", "mlp"), c.dtype, use_bias=False, name="gate")(y)
        up = Dense(c.mlp, ("embed", "mlp"), c.dtype, use_bias=False, name="up")(y)
        y = constrain(jax.nn.gelu(gate, approximate=True) * up, ("batch", "seq", "mlp"))
        x = x + Norm(c.eps, name="norm4")(Dense(c.width, ("mlp", "embed"), c.dtype, use_bias=False, name="down")(y))
        return constrain(x, ("batch", "seq", "embed")), None


class Gemma2(TextEncoder):
    """Hidden states after the final norm: the first and the last ``length - 1``, or all of them (None)."""

    config: Gemma2Config

    @nn.compact
    @part("mllm")
    def __call__(self, text: Text) -> States:
        """Padding stands on the right; its states mean nothing."""
        c, tokens, mask = self.config, text.tokens, text.mask
        n = tokens.shape[1]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab, c.width))
        x = table[tokens].astype(c.dtype) * jnp.asarray(c.width**0.5, c.dtype)

        frequencies = jnp.asarray(inverse_frequencies(c.head_width, c.theta), jnp.float32)
        angles = jnp.arange(n, dtype=jnp.float32)[:, None] * frequencies[None]
        angles = jnp.broadcast_to(angles, (tokens.shape[0], *angles.shape))
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        seen = (distance >= 0)[None] & mask[:, None, :]
        window = seen & (distance < c.window)[None]

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 4),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        sliding = jnp.arange(c.layers) % 2 == 0
        x, _ = layers(c, name="layers")(x, sliding, jnp.cos(angles), jnp.sin(angles), seen, window)
        states = States(Norm(c.eps, name="norm")(x), mask)
        return states if self.length is None else first_and_last(states, self.length)
