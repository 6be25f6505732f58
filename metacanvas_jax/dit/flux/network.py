"""FLUX.1 [dev] and FLUX.1 Kontext: double-stream blocks, then single-stream blocks, over one joint sequence.

Sequence: ``[context | target | reference 1 | reference 2 ...]``. Target tokens have the rotary ids
``(0, row, column)``, reference image ``i`` has ``(i, row, column)`` counted from ``i = 1`` with rows and columns
starting again at 0, context tokens are not rotated. Sources: diffusers 0.42.1
``models/transformers/transformer_flux.py`` and ``pipelines/flux/pipeline_flux_kontext.py``; black-forest-labs/flux
``src/flux/model.py``.

Noise level and guidance are multiplied by 1000 here, in float32; the reference rounds them to the compute dtype.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float

from metacanvas_jax.dit.double_stream import EPS, PROJECTIONS, Heads, Stream, attend_jointly
from metacanvas_jax.dit.packed import PackedDiT
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.prologue import LN2
from metacanvas_jax.nn.layers import Dense, Dtype, along_last, contract, layer_norm, zeros_init
from metacanvas_jax.nn.lora import Lora, LoraConfig, adapted, check_targets
from metacanvas_jax.nn.modulation import TimeEmbed, gated, modulate
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.nn.rope import grid_rotation
from metacanvas_jax.nn.stack import Remat, entering, hidden_units, stack
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import Given, States, Tokens


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Shape of a FLUX.1 transformer.

    ``pooled`` says where the pooled text vector comes from: ``given`` (``Given.pooled``, CLIP in the reference),
    ``zeros``, or ``learned``: a linear projection of the mean of the context over its unmasked tokens, zero at
    initialisation and thus equal to ``zeros`` there. With ``mask_context`` text states whose mask is False are not
    attended to; by default the mask is ignored, because the reference attends to its padding. ``lora`` adds adapters,
    without dropout, to the layers of the blocks that it targets (of ``PROJECTIONS``).
    """

    latent_channels: int = 16
    layers_double: int = 19
    layers_single: int = 38
    heads: int = 24
    head_width: int = 128
    mlp_ratio: int = 4
    context_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10000.0
    pooled: Literal["given", "zeros", "learned"] = "given"
    mask_context: bool = False
    lora: LoraConfig | None = None
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on fields that do not fit together."""
        check_targets(self.lora, PROJECTIONS, "FluxConfig")
        if sum(self.rope_axes) != self.head_width or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} must be even and sum to head_width {self.head_width}")
        if min(self.layers_double, self.layers_single) < 1:
            raise ValueError(f"{self.layers_double} double and {self.layers_single} single blocks: need one of each")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_width

    def adapts(self, layer: str) -> bool:
        """Whether LoRA adapts the layers of this name."""
        return self.lora is not None and layer in self.lora.targets


def flux_kontext_dev(**changes: object) -> FluxConfig:
    """FLUX.1-Kontext-dev, 11.9 B parameters."""
    return dataclasses.replace(FluxConfig(), **changes)


def flux_dev(**changes: object) -> FluxConfig:
    """FLUX.1-dev: the same network as Kontext, trained without reference images."""
    return dataclasses.replace(FluxConfig(), **changes)


def joint_rotation(
    config: FluxConfig, context: int, images: tuple[tuple[int, int], ...]
) -> tuple[Float[Array, "1 n f"], Float[Array, "1 n f"]]:
    """Cosines and sines of ``context`` unrotated tokens followed by images of the given (rows, columns)."""
    identity = jnp.zeros((1, context, config.head_width // 2), jnp.float32)
    tables = [(identity + 1.0, identity)]
    for index, (rows, columns) in enumerate(images):
        positions = (np.array([index]), np.arange(rows), np.arange(columns))
        tables.append(grid_rotation(positions, config.rope_axes, config.theta))
    cos, sin = zip(*tables, strict=True)
    return jnp.concatenate(cos, axis=1), jnp.concatenate(sin, axis=1)


def masked_mean(x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None) -> Float[Array, "b d"]:
    """Mean over the tokens whose mask is True, in float32; zero if there are none."""
    weight = jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask.astype(jnp.float32)
    total = jnp.einsum("bld,bl->bd", x.astype(jnp.float32), weight, precision=exact(weight))
    return total / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)


class VectorEmbed(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        """Embeds a vector."""
        x = jax.nn.silu(Dense(self.width, (None, "mlp"), self.dtype, name="fc1")(x))
        return Dense(self.width, ("mlp", "embed"), self.dtype, name="fc2")(x)


class DoubleBlock(nn.Module):
    """Image and text streams with separate weights and one joint attention, text first."""

    config: FluxConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b l d"], Float[Array, "b n d"]],
        vector: Float[Array, "b d"],
        cos: Float[Array, "1 m f"],
        sin: Float[Array, "1 m f"],
        mask: Bool[Array, "b m"] | None,
    ) -> tuple[tuple[Float[Array, "b l d"], Float[Array, "b n d"]], None]:
        """Maps (text, image) to (text, image)."""
        text, image = entering(streams)
        text_stream, image_stream = (Stream(self.config, self.config.lora, name=name) for name in ("text", "image"))
        length = text.shape[1]
        both = attend_jointly(
            (text_stream, image_stream),
            (text, image),
            (text_stream.modulations(vector), image_stream.modulations(vector)),
            ((cos[:, :length], sin[:, :length]), (cos[:, length:], sin[:, length:])),
            mask,
        )
        return both, None


class MlpUp(nn.Module):
    """First layer of a single block's MLP; the hidden axis stays folded as ``[r d]``, see ``JoinedOut``."""

    config: FluxConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n r d"]:
        """Widens ``d`` to ``r`` times ``d``."""
        width, ratio, dtype = self.config.width, self.config.mlp_ratio, self.config.dtype
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel = self.param("kernel", nn.with_logical_partitioning(init, ("embed", None, "mlp")), (width, ratio, width))
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, (None, "mlp")), (ratio, width))
        return contract(x, kernel.astype(dtype)) + bias.astype(dtype)[None, None]


class JoinedOut(nn.Module):
    """The one linear layer that reads a single block's attention (row 0 of the kernel) and its MLP (the other rows).

    The published kernel is ``[(1 + r) d, d]``. Folded like this, tensor parallelism splits heads and hidden units at
    the same places, so that neither activations nor weights move between devices.
    """

    config: FluxConfig

    @nn.compact
    def __call__(self, attended: Float[Array, "b n d"], hidden: Float[Array, "b n r d"]) -> Float[Array, "b n d"]:
        """Sums both projections."""
        width, ratio, dtype = self.config.width, self.config.mlp_ratio, self.config.dtype
        init = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, (None, "mlp", "embed")), (1 + ratio, width, width)
        )
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, ("embed",)), (width,))
        kernel = kernel.astype(dtype)
        y = contract(attended, kernel[0]) + contract(hidden, kernel[1:], 2)
        return y + along_last(bias.astype(dtype), y)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over the joint sequence, one shared norm, one shared output layer.

    Adapters of the first layer of the MLP and of the output layer are folded as these are.
    """

    config: FluxConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        vector: Float[Array, "b d"],
        cos: Float[Array, "1 m f"],
        sin: Float[Array, "1 m f"],
        mask: Bool[Array, "b m"] | None,
    ) -> tuple[Float[Array, "b m d"], None]:
        """Transforms text and image tokens alike."""
        config = self.config
        x = entering(x)
        layer = Dense(3 * config.width, ("embed", None), config.dtype, name="modulation")
        parts = adapted(layer, jax.nn.silu(vector), config.lora)
        shift, scale, gate = jnp.split(parts, 3, axis=-1)
        y = modulate(layer_norm(x, eps=EPS), shift, scale)
        q, k, v = Heads(config, config.lora, name="attention")(y, cos, sin)
        attended = attention(q, k, v, mask=MaskSpec(keys=mask), scale=LN2, exchange="heads")
        attended = rearrange(attended, "b n h e -> b n (h e)")
        hidden = MlpUp(config, name="up")(y)
        if config.adapts("up"):
            sizes, axes = (config.mlp_ratio, config.width), ("embed", None, "mlp")
            hidden = hidden + Lora(config.lora, sizes, axes, config.dtype, name="up_lora")(y)
        hidden = constrain(jax.nn.gelu(hidden_units(hidden)), ("batch", "seq", None, "mlp"))
        y = JoinedOut(config, name="out")(attended, hidden)
        if config.adapts("out"):
            joined = jnp.concatenate([attended[:, :, None], hidden], axis=2)
            y = y + Lora(config.lora, config.width, (None, "mlp", "embed"), config.dtype, 2, name="out_lora")(joined)
        return constrain(gated(x, y, gate), ("batch", "seq", "embed")), None


@struct.dataclass
class Carried:
    """``Tokens.private`` of FLUX: one vector of time, guidance and pooled text; tokens of each reference image."""

    vector: Any  # Float[Array, "b d"], or what a map over the tree puts in its place
    references: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (rows, columns)


class Flux(PackedDiT):
    """The velocity network. Images only: ``t`` is 1."""

    config: FluxConfig

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        width, dtype = config.width, config.dtype
        self.patch_in = Dense(width, (None, "embed"), dtype)
        self.context = Dense(width, (None, "embed"), dtype)
        self.time = TimeEmbed(width, dtype)
        if config.guidance:
            self.guidance = TimeEmbed(width, dtype)
        if config.pooled == "learned":
            self.pool = Dense(config.pooled_width, (None, "embed"), dtype, kernel_init=zeros_init)
        self.pooled = VectorEmbed(width, dtype)
        self.double = stack(DoubleBlock, config.layers_double, remat=config.remat, inputs=4)(config)
        self.single = stack(SingleBlock, config.layers_single, remat=config.remat, inputs=4)(config)
        self.modulation = Dense(2 * width, ("embed", None), dtype)
        self.out = Dense(4 * config.latent_channels, ("embed", None), dtype)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Packs and projects the noisy latents and the reference images, which may have any even size."""
        self.refuse(given, "channels")
        grid, reference, sizes = self.packed(latents, time, text, given)
        private = Carried(self._vector(time, text, given), sizes)
        return Tokens(grid=grid, time=time, reference=reference, private=private)

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """Both stacks of blocks over text, target and reference tokens."""
        _, _, rows, columns, _ = tokens.grid.shape
        vector, references = tokens.private.vector, tokens.private.references
        context = self.context(text.states)
        length = context.shape[1]
        image = rearrange(tokens.grid, "b 1 h w d -> b (h w) d")
        if tokens.reference is not None:
            image = jnp.concatenate([image, tokens.reference], axis=1)
        cos, sin = joint_rotation(self.config, length, ((rows, columns), *references))
        mask = self._mask(text, image.shape[1])
        (context, image), _ = self.double((context, image), vector, cos, sin, mask)
        joint, _ = self.single(jnp.concatenate([context, image], axis=1), vector, cos, sin, mask)
        image = joint[:, length:]
        grid = rearrange(image[:, : rows * columns], "b (h w) d -> b 1 h w d", h=rows)
        reference = None if tokens.reference is None else image[:, rows * columns :]
        return tokens.replace(grid=grid, reference=reference)

    def _vector(self, time: Float[Array, " b"], text: States, given: Given) -> Float[Array, "b d"]:
        config = self.config
        if (given.guidance is not None) != config.guidance:
            raise ValueError(f"Given.guidance must be set if and only if the config has guidance={config.guidance}")
        if (given.pooled is not None) != (config.pooled == "given"):
            raise ValueError(f"Given.pooled must be set if and only if pooled='given'; it is {config.pooled!r}")
        if config.pooled == "given":
            pooled = given.pooled
        elif config.pooled == "learned":
            pooled = self.pool(masked_mean(text.states, text.mask))
        else:
            pooled = jnp.zeros((time.shape[0], config.pooled_width), config.dtype)
        vector = self.time(1000.0 * time.astype(jnp.float32))
        if config.guidance:
            vector = vector + self.guidance(1000.0 * given.guidance.astype(jnp.float32))
        return vector + self.pooled(pooled)

    def _mask(self, text: States, images: int) -> Bool[Array, "b m"] | None:
        if not self.config.mask_context:
            return None
        if text.mask is None:
            raise ValueError("mask_context=True needs States.mask")
        return jnp.concatenate([text.mask, jnp.ones((text.mask.shape[0], images), bool)], axis=1)
