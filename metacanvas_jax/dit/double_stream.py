"""Double-stream blocks: text and image tokens have layers of their own and one joint attention.

Source: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206), section 4. The
names of the parameters follow the two streams; each network decides how a stream is rotated and modulated.
"""

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.prologue import LN2, prepare
from metacanvas_jax.nn.layers import Dense, Dtype, Gain, layer_norm
from metacanvas_jax.nn.lora import LoraConfig, adapted, adapter, plus
from metacanvas_jax.nn.modulation import gated, modulate
from metacanvas_jax.nn.stack import hidden_units
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.parallel.context import whole_sequence

EPS = 1e-6  # of every norm of a block
PROJECTIONS = ("q", "k", "v", "out", "up", "down", "modulation")  # layers of a stream that LoRA may adapt

Rotation = tuple[Float[Array, "#b _ f"], Float[Array, "#b _ f"]]
"""Cosines and sines of the tokens of a stream, for each sample or one for all samples."""

Parts = list[Float[Array, "b ... d"]]
"""Shift, scale and gate of the attention, then of the MLP; per sample or per token."""


@runtime_checkable
class Sizes(Protocol):
    """What a stream reads of the config of its network."""

    @property
    def width(self) -> int:
        """Width of a token."""
        ...

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        ...

    @property
    def mlp_ratio(self) -> int:
        """Width of the MLP's hidden layer, in widths of a token."""
        ...

    @property
    def dtype(self) -> Dtype:
        """Dtype of the computation."""
        ...


@runtime_checkable
class Half(Protocol):
    """What a joint attention needs of a stream: the layers before it, and those after it."""

    def before(
        self, x: Float[Array, "b n d"], parts: Parts, rotation: Rotation
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n h e"], Float[Array, "b n h e"]]:
        """Queries, keys and values, as ``Heads`` makes them."""
        ...

    def after(self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], parts: Parts) -> Float[Array, "b n d"]:
        """The tokens after the attention and the MLP."""
        ...


class Heads(nn.Module):
    """Queries, keys and values of one stream, with a norm per head on queries and keys."""

    config: Sizes
    lora: LoraConfig | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], cos: Float[Array, "#b n f"], sin: Float[Array, "#b n f"]
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n h e"], Float[Array, "b n h e"]]:
        """Projects, norms, rotates and splits heads; the scale of the logits is in q (attend with ``LN2``)."""
        config = self.config

        def project(name: str) -> Float[Array, "b n d"]:
            layer = Dense(config.width, ("embed", "heads"), config.dtype, self.use_bias, name=name)
            return constrain(adapted(layer, x, self.lora), ("batch", "seq", "heads"))

        gains = (Gain(config.head_width, None, name=name)() for name in ("q_norm", "k_norm"))
        q, k = prepare(project("q"), project("k"), *gains, cos, sin, EPS)
        v = constrain(rearrange(project("v"), "b n (h e) -> b n h e", h=q.shape[2]), ("batch", "seq", "heads", None))
        return whole_sequence(q), whole_sequence(k), whole_sequence(v)


class Stream(nn.Module):
    """The layers of a double block that image and text tokens have separately."""

    config: Sizes
    lora: LoraConfig | None = None

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        width, dtype = config.width, config.dtype
        self.modulation = Dense(6 * width, ("embed", None), dtype)
        self.attention = Heads(config, self.lora)
        self.out = Dense(width, ("heads", "embed"), dtype)
        self.up = Dense(config.mlp_ratio * width, ("embed", "mlp"), dtype)
        self.down = Dense(width, ("mlp", "embed"), dtype)
        self.modulation_lora = adapter("modulation", self.modulation, self.lora)
        self.out_lora = adapter("out", self.out, self.lora)
        self.up_lora = adapter("up", self.up, self.lora)
        self.down_lora = adapter("down", self.down, self.lora)

    def modulations(self, vector: Float[Array, "b d"]) -> Parts:
        """Shift, scale, gate of the attention, then of the MLP."""
        return jnp.split(plus(self.modulation, self.modulation_lora, jax.nn.silu(vector)), 6, axis=-1)

    def before(
        self, x: Float[Array, "b n d"], parts: Parts, rotation: Rotation
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n h e"], Float[Array, "b n h e"]]:
        """Queries, keys and values for the joint attention."""
        return self.attention(modulate(layer_norm(x, eps=EPS), parts[0], parts[1]), *rotation)

    def after(self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], parts: Parts) -> Float[Array, "b n d"]:
        """Output projection and MLP, each with a gated residual."""
        attended = plus(self.out, self.out_lora, attended)
        x = constrain(gated(x, attended, parts[2]), ("batch", "seq", "embed"))
        y = modulate(layer_norm(x, eps=EPS), parts[3], parts[4])
        hidden = hidden_units(plus(self.up, self.up_lora, y))
        hidden = constrain(jax.nn.gelu(hidden), ("batch", "seq", "mlp"))
        return constrain(gated(x, plus(self.down, self.down_lora, hidden), parts[5]), ("batch", "seq", "embed"))


def attend_jointly(
    streams: tuple[Half, Half],
    tokens: tuple[Float[Array, "b l d"], Float[Array, "b n d"]],
    parts: tuple[Parts, Parts],
    rotations: tuple[Rotation, Rotation],
    mask: Bool[Array, "b m"] | None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b n d"]]:
    """Both streams through one block; text comes first in every pair. ``mask`` is over text, then image."""
    text, image = tokens
    before = [stream.before(*each) for stream, *each in zip(streams, tokens, parts, rotations, strict=True)]
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*before, strict=True))
    attended = attention(q, k, v, mask=MaskSpec(keys=mask), scale=LN2, exchange="heads")
    attended = rearrange(attended, "b n h e -> b n (h e)")
    length = text.shape[1]
    text = streams[0].after(text, attended[:, :length], parts[0])
    return text, streams[1].after(image, attended[:, length:], parts[1])
