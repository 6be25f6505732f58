"""FLUX.2 [klein]: double-stream blocks, then single-stream blocks, over one joint sequence.

No layer has a bias, the MLPs are gated, and all blocks of a kind share one modulation, which the network makes once.

Sequence: ``[text | target | reference 1 | reference 2 ...]``. Rotary ids have four axes: time of the image, row,
column, place in the text. The target's tokens have ``(0, row, column, 0)``, reference image ``i``, counted from 1, has
``(10 i, row, column, 0)`` with rows and columns starting again at 0, and text state ``j`` has ``(0, 0, 0, j)``. States
that the mask hides take no place. Sources: diffusers 0.42.1 ``models/transformers/transformer_flux2.py`` and
``pipelines/flux2/pipeline_flux2_klein.py``.

The noise level is multiplied by 1000 here, in float32; the reference rounds it to the compute dtype.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float

from metacanvas_jax.dit.double_stream import EPS, Heads, Parts, Rotation, attend_jointly
from metacanvas_jax.dit.packed import PackedDiT
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.prologue import LN2, prepare
from metacanvas_jax.nn.gating import silu_gated
from metacanvas_jax.nn.layers import Dense, Dtype, Gain, contract, layer_norm
from metacanvas_jax.nn.lora import Lora, LoraConfig, adapter, check_targets, plus
from metacanvas_jax.nn.modulation import TimeEmbed, gated, modulate
from metacanvas_jax.nn.rope import grid_rotation
from metacanvas_jax.nn.stack import Remat, entering, hidden_units, stack
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.parallel.context import whole_sequence
from metacanvas_jax.types import Given, States, Tokens

REFERENCE_STEP = 10  # between the times of two images
# Layers that LoRA may adapt: of a double block's streams, and ``qkv_up`` and ``out`` of a single block.
PROJECTIONS = ("q", "k", "v", "out", "up", "down", "qkv_up")


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Shape of a FLUX.2 transformer without an input for guidance; the defaults are FLUX.2-klein-4B's.

    ``rope_axes`` are the channels of a head that turn with the image's index, the row, the column and the place in the
    text. ``lora`` adds adapters, without dropout, to the layers of the blocks that it targets (of ``PROJECTIONS``).
    """

    latent_channels: int = 128
    layers_double: int = 5
    layers_single: int = 20
    heads: int = 24
    head_width: int = 128
    mlp_ratio: int = 3
    context_width: int = 7680
    rope_axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    theta: float = 2000.0
    lora: LoraConfig | None = None
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on fields that do not fit together."""
        check_targets(self.lora, PROJECTIONS, "Flux2Config")
        if sum(self.rope_axes) != self.head_width or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} must be even and sum to head_width {self.head_width}")
        if min(self.layers_double, self.layers_single) < 1:
            raise ValueError(f"{self.layers_double} double and {self.layers_single} single blocks: need one of each")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_width


def flux2_klein_4b(**changes: Any) -> Flux2Config:
    """FLUX.2-klein-4B and FLUX.2-klein-base-4B: one network of 3.9 B parameters, two trainings."""
    return dataclasses.replace(Flux2Config(), **changes)


class FoldedOut(nn.Module):
    """A linear layer whose output channels are ``pieces`` of ``size``, on an axis of their own.

    Tensor parallelism splits every piece at the same places, so that pieces are combined without an exchange.
    """

    pieces: int
    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n r s"]:
        """All pieces."""
        axes, sizes = ("embed", None, "mlp"), (self.pieces, self.size)
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel = self.param("kernel", nn.with_logical_partitioning(init, axes), (x.shape[-1], *sizes))
        y = contract(x.astype(self.dtype), kernel.astype(self.dtype))
        return constrain(y, ("batch", "seq", None, "mlp"))


class JoinedOut(nn.Module):
    """The one linear layer that reads a single block's attention (row 0 of the kernel) and its MLP (the other rows)."""

    config: Flux2Config

    @nn.compact
    def __call__(self, attended: Float[Array, "b n d"], hidden: Float[Array, "b n r d"]) -> Float[Array, "b n d"]:
        """Sums both projections."""
        width, rows, dtype = self.config.width, 1 + self.config.mlp_ratio, self.config.dtype
        init = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        names = (None, "mlp", "embed")
        kernel = self.param("kernel", nn.with_logical_partitioning(init, names), (rows, width, width)).astype(dtype)
        return contract(attended, kernel[0]) + contract(hidden, kernel[1:], 2)


class Stream(nn.Module):
    """The layers of a double block that image and text tokens have separately."""

    config: Flux2Config

    def setup(self) -> None:
        """Names the layers."""
        c = self.config
        self.attention = Heads(c, c.lora, use_bias=False)
        self.out = Dense(c.width, ("heads", "embed"), c.dtype, use_bias=False)
        self.up = FoldedOut(2, c.mlp_ratio * c.width, c.dtype)
        self.down = Dense(c.width, ("mlp", "embed"), c.dtype, use_bias=False)
        self.out_lora = adapter("out", self.out, c.lora)
        self.up_lora = folded_adapter("up", self.up, c.lora)
        self.down_lora = adapter("down", self.down, c.lora)

    def before(
        self, x: Float[Array, "b n d"], parts: Parts, rotation: Rotation
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n h e"], Float[Array, "b n h e"]]:
        """Queries, keys and values for the joint attention."""
        return self.attention(modulate(layer_norm(x, eps=EPS), parts[0], parts[1]), *rotation)

    def after(self, x: Float[Array, "b n d"], attended: Float[Array, "b n d"], parts: Parts) -> Float[Array, "b n d"]:
        """Output projection and gated MLP, each with a gated residual."""
        x = constrain(gated(x, plus(self.out, self.out_lora, attended), parts[2]), ("batch", "seq", "embed"))
        y = modulate(layer_norm(x, eps=EPS), parts[3], parts[4])
        both = self.up(y) if self.up_lora is None else self.up(y) + self.up_lora(y)
        both = hidden_units(both)
        hidden = constrain(silu_gated(both[:, :, 0], both[:, :, 1]), ("batch", "seq", "mlp"))
        return constrain(gated(x, plus(self.down, self.down_lora, hidden), parts[5]), ("batch", "seq", "embed"))


class DoubleBlock(nn.Module):
    """Text and image streams with separate weights and one joint attention, text first."""

    config: Flux2Config

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b l d"], Float[Array, "b n d"]],
        parts: tuple[Parts, Parts],
        rotations: tuple[Rotation, Rotation],
        mask: Bool[Array, "b m"] | None,
    ) -> tuple[tuple[Float[Array, "b l d"], Float[Array, "b n d"]], None]:
        """Maps (text, image) to (text, image); ``parts`` and ``rotations`` are in the same order."""
        both = (Stream(self.config, name="text"), Stream(self.config, name="image"))
        return attend_jointly(both, entering(streams), parts, rotations, mask), None


class SingleBlock(nn.Module):
    """Attention and gated MLP in parallel over the joint sequence: one layer before both, one layer after both.

    The pieces of ``qkv_up`` are queries, keys, values, then those of the gates, then those of the values of the MLP.
    """

    config: Flux2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], parts: Parts, rotation: Rotation, mask: Bool[Array, "b m"] | None
    ) -> tuple[Float[Array, "b m d"], None]:
        """Transforms text and image tokens alike; ``parts`` are shift, scale and gate."""
        c, ratio = self.config, self.config.mlp_ratio
        x = entering(x)
        y = modulate(layer_norm(x, eps=EPS), parts[0], parts[1])
        layer = FoldedOut(3 + 2 * ratio, c.width, c.dtype, name="qkv_up")
        pieces = layer(y)
        if (lora := folded_adapter("qkv_up", layer, c.lora, name="qkv_up_lora")) is not None:
            pieces = pieces + lora(y)
        q_gain, k_gain = (Gain(c.head_width, None, name=name)() for name in ("q_norm", "k_norm"))
        cos, sin = rotation
        q, k = prepare(pieces[:, :, 0], pieces[:, :, 1], q_gain, k_gain, cos, sin, EPS)
        v = rearrange(pieces[:, :, 2], "b n (h e) -> b n h e", e=c.head_width)
        v = constrain(v, ("batch", "seq", "heads", None))
        q, k, v = whole_sequence(q), whole_sequence(k), whole_sequence(v)
        attended = attention(q, k, v, mask=MaskSpec(keys=mask), scale=LN2, exchange="heads")
        attended = rearrange(attended, "b n h e -> b n (h e)")
        gate, value = (hidden_units(part) for part in jnp.split(pieces[:, :, 3:], 2, axis=2))
        hidden = silu_gated(gate, value)
        hidden = constrain(hidden, ("batch", "seq", None, "mlp"))
        y = JoinedOut(c, name="out")(attended, hidden)
        if c.lora is not None and "out" in c.lora.targets:
            joined = jnp.concatenate([attended[:, :, None], hidden], axis=2)
            y = y + Lora(c.lora, c.width, (None, "mlp", "embed"), c.dtype, 2, name="out_lora")(joined)
        return constrain(gated(x, y, parts[2]), ("batch", "seq", "embed")), None


def folded_adapter(target: str, layer: FoldedOut, config: LoraConfig | None, name: str | None = None) -> Lora | None:
    """The adapter of a folded layer if the config targets it, folded as the layer is."""
    if config is None or target not in config.targets:
        return None
    return Lora(config, (layer.pieces, layer.size), ("embed", None, "mlp"), layer.dtype, name=name)


def text_rotation(config: Flux2Config, text: States) -> Rotation:
    """Cosines and sines ``[b l f]`` of text states, ``[1 l f]`` without a mask."""
    places = np.arange(text.states.shape[1])
    zero = np.array([0])
    cos, sin = grid_rotation((zero, zero, zero, places), config.rope_axes, config.theta)
    if text.mask is None:
        return cos, sin
    index = jnp.maximum(jnp.cumsum(text.mask, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take(cos[0], index, axis=0), jnp.take(sin[0], index, axis=0)


def image_rotation(config: Flux2Config, images: tuple[tuple[int, int], ...]) -> Rotation:
    """Cosines and sines ``[1 n f]`` of images of the given (rows, columns) of tokens, one after the other."""
    tables = []
    for i, (rows, columns) in enumerate(images):
        axes = (np.array([REFERENCE_STEP * i]), np.arange(rows), np.arange(columns), np.array([0]))
        tables.append(grid_rotation(axes, config.rope_axes, config.theta))
    cos, sin = zip(*tables, strict=True)
    return jnp.concatenate(cos, axis=1), jnp.concatenate(sin, axis=1)


def joined(text: Rotation, image: Rotation) -> Rotation:
    """Both one after the other along the tokens; the image's are the same for all samples."""
    batch = text[0].shape[0]
    pairs = zip(text, image, strict=True)
    first, second = (jnp.concatenate([t, jnp.broadcast_to(i, (batch, *i.shape[1:]))], axis=1) for t, i in pairs)
    return first, second


@struct.dataclass
class Carried:
    """``Tokens.private`` of FLUX.2: the embedding of the noise level; tokens of each reference image."""

    vector: Any  # Float[Array, "b d"], or what a map over the tree puts in its place
    references: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (rows, columns)


class Flux2(PackedDiT):
    """The velocity network. Images only: ``t`` is 1. A token is one latent."""

    config: Flux2Config
    fold = 1

    def setup(self) -> None:
        """Names the layers."""
        c = self.config

        def layer(features: int, first: str | None, second: str | None) -> Dense:
            return Dense(features, (first, second), c.dtype, use_bias=False)

        self.patch_in = layer(c.width, None, "embed")
        self.context = layer(c.width, None, "embed")
        self.time = TimeEmbed(c.width, c.dtype, use_bias=False)
        self.modulation_image = layer(6 * c.width, "embed", None)
        self.modulation_text = layer(6 * c.width, "embed", None)
        self.modulation_single = layer(3 * c.width, "embed", None)
        self.double = stack(DoubleBlock, c.layers_double, remat=c.remat, inputs=3)(c)
        self.single = stack(SingleBlock, c.layers_single, remat=c.remat, inputs=3)(c)
        self.modulation = layer(2 * c.width, "embed", None)
        self.out = layer(c.latent_channels, "embed", None)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Projects the noisy latents and the reference images, which may have any size."""
        self.refuse(given, "channels", "pooled", "guidance")
        grid, reference, sizes = self.packed(latents, time, text, given)
        private = Carried(self.time(1000.0 * time.astype(jnp.float32)), sizes)
        return Tokens(grid=grid, time=time, reference=reference, private=private)

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """Both stacks of blocks over text, target and reference tokens."""
        _, _, rows, columns, _ = tokens.grid.shape
        count, length = rows * columns, text.states.shape[1]
        image = rearrange(tokens.grid, "b 1 h w d -> b (h w) d")
        if tokens.reference is not None:
            image = jnp.concatenate([image, tokens.reference], axis=1)
        vector = jax.nn.silu(tokens.private.vector)
        of_text, of_image = (
            jnp.split(layer(vector), 6, axis=-1) for layer in (self.modulation_text, self.modulation_image)
        )
        of_both = jnp.split(self.modulation_single(vector), 3, axis=-1)
        images = ((rows, columns), *tokens.private.references)
        rotations = text_rotation(self.config, text), image_rotation(self.config, images)
        mask = None
        if text.mask is not None:
            mask = jnp.concatenate([text.mask, jnp.ones(image.shape[:2], bool)], axis=1)
        context = self.context(text.states)
        (context, image), _ = self.double((context, image), (of_text, of_image), rotations, mask)
        both, _ = self.single(jnp.concatenate([context, image], axis=1), of_both, joined(*rotations), mask)
        image = both[:, length:]
        grid = rearrange(image[:, :count], "b (h w) d -> b 1 h w d", h=rows)
        return tokens.replace(grid=grid, reference=None if tokens.reference is None else image[:, count:])
