"""Wan 2.1 and 2.2 video transformers (text-to-video, and Wan 2.2 TI2V with first-frame image-to-video).

Sequence: patch tokens ordered frame, row, column. Reference frames stand in front of the noisy ones in time, as in
Wan-Animate: frame ``i`` of the references has the rotary time index ``i``, and the noisy frames start at the number of
reference frames. References are clean: their noise level is 0, and the velocity is returned for the noisy frames only.

The noise level may be given per frame. diffusers takes it per token (``expand_timesteps``), but all tokens of a frame
have the same one; per frame, the modulation is computed ``rows * columns`` times less often.

Sources: diffusers 0.42.1 ``models/transformers/transformer_wan.py``, ``pipelines/wan/pipeline_wan_i2v.py``;
Wan-Video/Wan2.2 ``wan/modules/model.py``.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.dit.base import DiT
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.prologue import LN2, prepare
from metacanvas_jax.nn.layers import Dense, Dtype, Gain, LayerNorm, RMSNorm, layer_norm, zeros_init
from metacanvas_jax.nn.lora import LoraConfig, adapted, check_targets
from metacanvas_jax.nn.modulation import TimeEmbed, table_init
from metacanvas_jax.nn.rope import grid_rotation
from metacanvas_jax.nn.stack import Remat, entering, hidden_units, stack
from metacanvas_jax.parallel.activations import constrain, constrain_grid
from metacanvas_jax.types import Given, Grid, States, Tokens

PROJECTIONS = ("q", "k", "v", "out", "up", "down")  # layers that LoRA may adapt: of both attentions, the MLP


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape of a Wan transformer; the width is ``heads * head_width``.

    ``extra_channels`` are channels concatenated to the noisy latents (reference, condition and mask latents of
    ``Given.channels``); their input weights start at zero. ``freq`` is the width of the timestep's sinusoid.
    With ``mask_context`` text states whose mask is False are not attended to. Without it they are set to zero and
    attended to, as the reference does with its padding. ``lora`` adds adapters, without dropout, to the layers of the
    blocks that it targets (of ``PROJECTIONS``).
    """

    latent_channels: int = 48
    extra_channels: int = 0
    heads: int = 24
    head_width: int = 128
    mlp: int = 14336
    layers: int = 30
    context_width: int = 4096
    freq: int = 256
    patch: Grid = (1, 2, 2)
    cross_norm: bool = True
    eps: float = 1e-6
    theta: float = 10000.0
    mask_context: bool = False
    lora: LoraConfig | None = None
    remat: Remat = "none"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on fields that do not fit together."""
        check_targets(self.lora, PROJECTIONS, "WanConfig")
        if self.head_width % 2 or self.freq % 2:
            raise ValueError(f"head_width {self.head_width} and freq {self.freq} must be even")
        if self.patch[0] != 1:
            raise ValueError(f"patch {self.patch}: noise levels per frame need patches of one frame")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_width

    @property
    def rope_axes(self) -> Grid:
        """Channels of a head that are rotated by time, row and column."""
        space = 2 * (self.head_width // 6)
        return (self.head_width - 2 * space, space, space)


def wan2_2_ti2v_5b(**changes: object) -> WanConfig:
    """Wan2.2-TI2V-5B: text- and image-to-video over the 48-channel autoencoder."""
    return dataclasses.replace(WanConfig(), **changes)


def wan2_1_t2v_1_3b(**changes: object) -> WanConfig:
    """Wan2.1-T2V-1.3B."""
    return dataclasses.replace(WanConfig(latent_channels=16, heads=12, mlp=8960), **changes)


def wan2_1_t2v_14b(**changes: object) -> WanConfig:
    """Wan2.1-T2V-14B."""
    return dataclasses.replace(WanConfig(latent_channels=16, heads=40, mlp=13824, layers=40), **changes)


class Carried(NamedTuple):
    """``Tokens.private`` of Wan, float32: time embedding and its six chunks; ``f`` is 1 or the number of frames."""

    embedded: Float[Array, "b f d"]
    chunks: Float[Array, "b f 6 d"]


def patches(latents: Float[Array, "b t h w c"], patch: Grid) -> Float[Array, "b t h2 w2 i"]:
    """Cuts latents into patches whose values are ordered channel, frame, row, column (a convolution's kernel)."""
    o, p, q = patch
    return rearrange(latents, "b (t o) (h p) (w q) c -> b t h w (c o p q)", o=o, p=p, q=q)


def unpatches(tokens: Float[Array, "b t h w i"], patch: Grid) -> Float[Array, "b t2 h2 w2 c"]:
    """Joins patches whose values are ordered frame, row, column, channel: not the order of ``patches``."""
    o, p, q = patch
    return rearrange(tokens, "b t h w (o p q c) -> b (t o) (h p) (w q) c", o=o, p=p, q=q)


def per_token(x: Float[Array, "b f d"], n: int) -> Float[Array, "b m d"]:
    """Repeats a vector per frame for each of its tokens; one vector for all frames stays as it is, to be broadcast."""
    return x if x.shape[1] == 1 else jnp.repeat(x, n // x.shape[1], axis=1)


class Attention(nn.Module):
    """Self- or cross-attention; q and k are normalised over all heads together."""

    config: WanConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        source: Float[Array, "b m d"],
        rotation: tuple[Float[Array, "1 n f"], Float[Array, "1 n f"]] | None,
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b n d"]:
        """``x`` attends to ``source``; ``rotation`` (cosines, sines) makes it self-attention with rotary positions."""
        config = self.config
        own = rotation is not None

        def project(name: str, z: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
            return adapted(Dense(config.width, ("embed", "heads"), config.dtype, name=name), z, config.lora)

        def split(z: Float[Array, "b k d"], sequence: str = "seq") -> Float[Array, "b k h e"]:
            z = rearrange(z, "b n (h e) -> b n h e", e=config.head_width)
            return constrain(z, ("batch", sequence, "heads", None))

        q, k = project("q", x), project("k", source)
        if own:
            q, k = (constrain(z, ("batch", "seq", "heads")) for z in (q, k))
            gains = (Gain(config.width, "heads", name=name)() for name in ("q_norm", "k_norm"))
            q, k = prepare(q, k, *gains, *rotation, config.eps)
            v = split(project("v", source))
            out = attention(q, k, v, mask=MaskSpec(keys=mask), scale=LN2, exchange="any")
        else:
            q = split(RMSNorm(config.eps, "heads", name="q_norm")(q))
            k = split(RMSNorm(config.eps, "heads", name="k_norm")(k), "whole_seq")
            out = attention(q, k, split(project("v", source), "whole_seq"), mask=MaskSpec(keys=mask))
        out = rearrange(out, "b n h e -> b n (h e)")
        return adapted(Dense(config.width, ("heads", "embed"), config.dtype, name="out"), out, config.lora)


class WanBlock(nn.Module):
    """Self-attention and MLP modulated by time, with cross-attention to the text between them.

    Norms, modulation and the gated residuals are float32 and cast back at each step, as in the reference.
    """

    config: WanConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b l d"],
        chunks: Float[Array, "b f 6 d"],
        rotation: tuple[Float[Array, "1 n e"], Float[Array, "1 n e"]],
        mask: Bool[Array, "b l"] | None,
    ) -> tuple[Float[Array, "b n d"], None]:
        """``chunks`` are shift, scale, gate of the self-attention, then of the MLP; the block's table is added."""
        config = self.config
        x = entering(x)
        table = self.param("table", nn.with_logical_partitioning(table_init, (None, "embed")), (6, config.width))
        chunks = chunks + table.astype(jnp.float32)[None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(chunks[:, :, i], x.shape[1]) for i in range(6))

        y = modulated_norm(x, shift1, scale1, config.eps)
        y = Attention(config, name="self")(y, y, rotation, None)
        x = constrain(gated_sum(x, y, gate1), ("batch", "seq", "embed"))

        y = LayerNorm(config.eps, name="cross_norm")(x) if config.cross_norm else x
        x = constrain(x + Attention(config, name="cross")(y, context, None, mask), ("batch", "seq", "embed"))

        y = modulated_norm(x, shift2, scale2, config.eps)
        y = adapted(Dense(config.mlp, ("embed", "mlp"), config.dtype, name="up"), y, config.lora)
        y = constrain(jax.nn.gelu(hidden_units(y)), ("batch", "seq", "mlp"))
        y = adapted(Dense(config.width, ("mlp", "embed"), config.dtype, name="down"), y, config.lora)
        x = gated_sum(x, y, gate2)
        return constrain(x, ("batch", "seq", "embed")), None


def modulated_norm(
    x: Float[Array, "b n d"], shift: Float[Array, "b #n d"], scale: Float[Array, "b #n d"], eps: float
) -> Float[Array, "b n d"]:
    """Layer norm without gain, scaled and shifted; float32 until the last cast."""
    return (layer_norm(x.astype(jnp.float32), eps=eps) * (1.0 + scale) + shift).astype(x.dtype)


def gated_sum(
    x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Float[Array, "b #n d"]
) -> Float[Array, "b n d"]:
    """``x + gate * y`` in float32, cast back."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


class Wan(DiT):
    """The velocity network."""

    config: WanConfig

    videos = True
    references = True

    @property
    def given_channels(self) -> int:
        """Number of input channels for ``Given.channels``."""
        return self.config.extra_channels

    def setup(self) -> None:
        """Names the layers."""
        config = self.config
        width, dtype = config.width, config.dtype
        self.patch_in = Dense(width, (None, "embed"), dtype)
        if config.extra_channels:
            self.extra_in = Dense(width, (None, "embed"), dtype, use_bias=False, kernel_init=zeros_init)
        self.time = TimeEmbed(width, "float32", config.freq)
        self.time_chunks = Dense(6 * width, ("embed", None), "float32")
        self.context_fc1 = Dense(width, (None, "mlp"), dtype)
        self.context_fc2 = Dense(width, ("mlp", "embed"), dtype)
        self.blocks = stack(WanBlock, config.layers, remat=config.remat, inputs=4)(config)
        self.table = self.param("table", nn.with_logical_partitioning(table_init, (None, "embed")), (2, width))
        self.out = Dense(math.prod(config.patch) * config.latent_channels, ("embed", None), dtype)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        text: States,
        given: Given,
    ) -> Tokens:
        """Patch tokens of the noisy frames, and those of the reference frames in ``Tokens.reference``.

        ``Given.reference`` are clean latents of the same rows and columns, of any number of frames each.
        ``Given.channels`` are for the noisy frames (reference frames then get zeros), or for the reference frames and
        the noisy frames.
        """
        self.check_inputs(latents, time, text)
        self._check_given(latents, given)
        frames = jnp.concatenate([*given.reference, latents], axis=1)
        references = frames.shape[1] - latents.shape[1]
        grid = self.patch_in(patches(frames, self.config.patch))
        if self.config.extra_channels:
            channels = given.channels
            missing = frames.shape[1] - channels.shape[1]
            channels = jnp.pad(channels, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
            grid = grid + self.extra_in(patches(channels, self.config.patch))
        grid = constrain_grid(grid, "embed")

        level = time[:, None] if time.ndim == 1 else time
        if references:
            level = jnp.broadcast_to(level, latents.shape[:2])
            level = jnp.pad(level, ((0, 0), (references, 0)))
        embedded = self.time(1000.0 * level.astype(jnp.float32))
        chunks = rearrange(self.time_chunks(jax.nn.silu(embedded)), "b f (k d) -> b f k d", k=6)
        reference = rearrange(grid[:, :references], "b t h w d -> b (t h w) d") if references else None
        return Tokens(grid=grid[:, references:], time=time, reference=reference, private=Carried(embedded, chunks))

    def run(self, tokens: Tokens, text: States) -> Tokens:
        """The blocks, over reference and noisy frames."""
        _, frames, rows, columns, _ = tokens.grid.shape
        x = rearrange(tokens.grid, "b t h w d -> b (t h w) d")
        references = 0
        if tokens.reference is not None:
            references = tokens.reference.shape[1]
            x = constrain(jnp.concatenate([tokens.reference, x], axis=1), ("batch", "seq", "embed"))
        total = frames + references // (rows * columns)
        positions = (np.arange(total), np.arange(rows), np.arange(columns))
        rotation = grid_rotation(positions, self.config.rope_axes, self.config.theta)
        context, mask = self._context(text)
        x, _ = self.blocks(x, context, tokens.private.chunks, rotation, mask)
        grid = rearrange(x[:, references:], "b (t h w) d -> b t h w d", t=frames, h=rows)
        return tokens.replace(grid=grid, reference=x[:, :references] if references else None)

    def unembed(self, tokens: Tokens) -> Float[Array, "b t h w c"]:
        """Final norm and projection of the noisy frames; float32."""
        frames = tokens.grid.shape[1]
        embedded = tokens.private.embedded[:, -frames:]
        table = self.table.astype(jnp.float32)[None, None]
        parts = embedded[:, :, None] + table
        x = rearrange(tokens.grid, "b t h w d -> b (t h w) d")
        shift, scale = (per_token(parts[:, :, i], x.shape[1]) for i in range(2))
        x = self.out(modulated_norm(x, shift, scale, self.config.eps))
        x = rearrange(x, "b (t h w) i -> b t h w i", t=frames, h=tokens.grid.shape[2])
        return unpatches(x, self.config.patch).astype(jnp.float32)

    def _context(self, text: States) -> tuple[Float[Array, "b l d"], Bool[Array, "b l"] | None]:
        states, mask = text.states, text.mask
        if mask is None and self.config.mask_context:
            raise ValueError("mask_context=True needs States.mask")
        if mask is not None and not self.config.mask_context:
            states, mask = jnp.where(mask[:, :, None], states, jnp.zeros_like(states)), None
        return self.context_fc2(jax.nn.gelu(self.context_fc1(states))), mask

    def _check_given(self, latents: Float[Array, "b t h w c"], given: Given) -> None:
        _, frames, rows, columns, _ = latents.shape
        extra = self.config.extra_channels
        self.refuse(given, "pooled", "guidance")
        for i, z in enumerate(given.reference):
            if z.shape[2:] != latents.shape[2:]:
                raise ValueError(
                    f"Wan reference {i} [h w c] = {list(z.shape[2:])}: expected that of the latents, "
                    f"{list(latents.shape[2:])}"
                )
        if (given.channels is not None) != bool(extra):
            raise ValueError(f"Given.channels must be set if and only if the config has extra_channels; it has {extra}")
        if given.channels is not None:
            total = frames + sum(z.shape[1] for z in given.reference)
            found = given.channels.shape[1:]
            if found[0] not in (frames, total) or found[1:] != (rows, columns, extra):
                raise ValueError(
                    f"Given.channels [t h w c] = {list(found)}: expected {extra} channels, "
                    f"{rows}x{columns} and {frames} noisy frames (or {total} with the references)"
                )
