"""The canvas connector: what the MLLM wrote on the canvas, added patch by patch to the noisy latents.

Paper, section 3.4 and Algorithm 1. Both parts end in a zero-initialised linear layer, so that a new connector changes
nothing. One connector serves every DiT, because it works on patch tokens on their grid. (Algorithm 1 has a patch
embedding inside the connector, of the same shape and in the same place as the DiT's; here the DiT's own is used.)
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
from einops import rearrange, repeat
from jaxtyping import Array, Float

from metacanvas_jax.dit.blocks import LinearBlock
from metacanvas_jax.kernels.attention import attention
from metacanvas_jax.nn.layers import Dense, Dtype, LayerNorm, RMSNorm, zeros_init
from metacanvas_jax.nn.modulation import AdaLNSingle
from metacanvas_jax.nn.resize import linear_resize
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import Tokens


@dataclasses.dataclass(frozen=True)
class CanvasConnectorConfig:
    """Shape and ablations of the canvas connector.

    ``width`` is the DiT's. The vanilla block has width ``vanilla_width`` (None: the DiT's), heads of
    ``vanilla_head_width`` and a hidden layer of ``vanilla_ratio`` times its width. The DiT block has heads of
    ``head_width`` and a Mix-FFN of ``mlp_ratio``; ``time_scale`` turns noise levels into its timesteps.

    Ablations (paper, Table 3): ``vanilla_block`` False keeps only the norm and the zero-initialised linear layer of
    part 1. ``dit_block`` False makes part 2 a plain sum. ``time_modulation`` False modulates the DiT block by its
    learned table only, without the noise level. ``fuse`` "before_patchify" adds the canvas, in ``latent_channels``, to
    the noisy latents; the DiT block then works on the patch tokens of that sum.
    """

    width: int
    vanilla_width: int | None = None
    vanilla_head_width: int = 64
    vanilla_ratio: float = 4.0
    head_width: int = 32
    mlp_ratio: float = 2.5
    time_scale: float = 1000.0
    vanilla_block: bool = True
    dit_block: bool = True
    time_modulation: bool = True
    fuse: Literal["after_patchify", "before_patchify"] = "after_patchify"
    latent_channels: int | None = None
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on sizes that do not fit together."""
        if self.dit_block and self.width % self.head_width:
            raise ValueError(f"CanvasConnectorConfig: width {self.width} is no multiple of {self.head_width}.")
        if self.vanilla_block and self.block_width % self.vanilla_head_width:
            raise ValueError(
                f"CanvasConnectorConfig: vanilla width {self.block_width} is no multiple of {self.vanilla_head_width}."
            )
        if self.fuse == "before_patchify" and self.latent_channels is None:
            raise ValueError("CanvasConnectorConfig: fuse='before_patchify' needs latent_channels.")

    @property
    def block_width(self) -> int:
        """Width of the vanilla block."""
        return self.vanilla_width or self.width


class VanillaBlock(nn.Module):
    """Pre-norm transformer block: softmax attention among all tokens, both ways, and a GELU feed-forward."""

    heads: int
    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Adds no positions: they are in the states that the MLLM wrote.

        The tokens are not split over devices: they are few, and their number (such as 3 x 11 x 20) seldom divides.
        """
        width = x.shape[-1]
        y = LayerNorm(1e-6, name="norm1")(x)
        q, k, v = (
            constrain(
                rearrange(
                    Dense(width, ("embed", "heads"), self.dtype, name=name)(y), "b n (h e) -> b n h e", h=self.heads
                ),
                ("batch", None, "heads", None),
            )
            for name in "qkv"
        )
        y = rearrange(attention(q, k, v), "b n h e -> b n (h e)")
        x = x + Dense(width, ("heads", "embed"), self.dtype, name="out")(y)
        y = Dense(self.hidden, ("embed", "mlp"), self.dtype, name="fc1")(LayerNorm(1e-6, name="norm2")(x))
        y = constrain(jax.nn.gelu(y, approximate=True), ("batch", None, "mlp"))
        x = x + Dense(width, ("mlp", "embed"), self.dtype, name="fc2")(y)
        return constrain(x, ("batch", None, "embed"))


class CanvasConnector(nn.Module):
    """``read`` the MLLM's canvas, then ``add`` it to latents or tokens.

    A model calls ``canvas = read(hidden)``, ``latents = add_to_latents(latents, canvas)``, ``tokens = dit.embed(...)``
    and ``tokens = add(tokens, canvas)``; the config decides which of the two additions uses the canvas.
    """

    config: CanvasConnectorConfig

    def setup(self) -> None:
        """Only the layers that the config asks for."""
        c = self.config
        self.norm = RMSNorm(1e-6)
        if c.vanilla_block:
            self.project = Dense(c.block_width, (None, "embed"), c.dtype)
            heads = c.block_width // c.vanilla_head_width
            self.block = VanillaBlock(heads, int(c.vanilla_ratio * c.block_width), c.dtype)
        channels = c.width if c.fuse == "after_patchify" else c.latent_channels
        self.zero = Dense(channels, ("embed", None), c.dtype, kernel_init=zeros_init)
        if c.dit_block:
            if c.time_modulation:
                self.time = AdaLNSingle(c.width, c.dtype)
            self.dit = LinearBlock(c.width // c.head_width, int(c.mlp_ratio * c.width), c.dtype)
            self.dit_zero = Dense(c.width, ("embed", None), c.dtype, kernel_init=zeros_init)

    def __call__(self, hidden: Float[Array, "b k y x d"], tokens: Tokens) -> Tokens:
        """``add(tokens, read(hidden))``."""
        return self.add(tokens, self.read(hidden))

    def read(self, hidden: Float[Array, "b k y x d"]) -> Float[Array, "b k y x c"]:
        """Part 1: the canvas in the DiT's width (in latent channels when fused before patchification).

        The states are normalised first, because the MLLM's last norm gives them any scale. All canvas tokens of all
        keyframes attend to each other.
        """
        _, k, y, x, _ = hidden.shape
        canvas = self.norm(rearrange(hidden, "b k y x d -> b (k y x) d"))
        if self.config.vanilla_block:
            canvas = self.block(self.project(canvas))
        return rearrange(self.zero(canvas), "b (k y x) d -> b k y x d", k=k, y=y, x=x)

    def add_to_latents(
        self, latents: Float[Array, "b t h w c"], canvas: Float[Array, "b k y x d"]
    ) -> Float[Array, "b t h w c"]:
        """The noisy latents, with the interpolated canvas added if it is fused before patchification."""
        if self.config.fuse == "after_patchify":
            return latents
        return latents + linear_resize(canvas, latents.shape[1:4]).astype(latents.dtype)

    def add(self, tokens: Tokens, canvas: Float[Array, "b k y x c"]) -> Tokens:
        """Part 2: ``s = grid + canvas``, then ``s + zero_linear(dit_block(s))``, frame by frame.

        Because ``s`` itself is part of the result, part 1 needs a zero-initialised layer too. In the first step only
        the zero-initialised layers get a gradient. With one noise level per frame the block reads that of the last.
        """
        c = self.config
        grid = tokens.grid
        if c.fuse == "after_patchify":
            grid = grid + linear_resize(canvas, grid.shape[1:4]).astype(grid.dtype)
        if not c.dit_block:
            return tokens.replace(grid=grid)
        frames = grid.shape[1]
        chunks = None
        if c.time_modulation:
            time = tokens.time if tokens.time.ndim == 1 else tokens.time[:, -1]
            _, chunks = self.time(c.time_scale * time)
            chunks = repeat(chunks, "b six d -> (b t) six d", t=frames)
        out, _ = self.dit(rearrange(grid, "b t h w d -> (b t) h w d"), chunks)
        out = rearrange(self.dit_zero(out), "(b t) h w d -> b t h w d", t=frames)
        return tokens.replace(grid=grid + out.astype(grid.dtype))
