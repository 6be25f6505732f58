"""The parts of MetaCanvas that no published model has: canvas tokens and the two connectors (paper, section 3.4).

Names of modules are names of tensors in ``connector/model.safetensors``. Channels stand last, as in the rest of the
project: a canvas is ``[b k y x d]``, patch tokens are ``[b t h w d]``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn
from torch.nn import functional as F

from metacanvas_jax.torch_export import sides

GELU_TANH = nn.GELU(approximate="tanh")
ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": GELU_TANH, "silu": nn.SiLU()}


def resize(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """``[b k y x d]`` to ``[b *grid d]``, linearly between cell centres."""
    if tuple(x.shape[1:4]) == tuple(grid):
        return x
    resized = F.interpolate(x.movedim(-1, 1), size=tuple(grid), mode="trilinear", align_corners=False)
    return resized.movedim(1, -1)


class CanvasTokens(nn.Module):
    """The learnable canvas ``[k y x d]``."""

    def __init__(self, keyframes: int, rows: int, columns: int, width: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(keyframes, rows, columns, width))

    def forward(self, shape: tuple[int, int, int] | None = None) -> Tensor:
        """The tokens, interpolated if another shape is asked for."""
        return self.tokens if shape is None else resize(self.tokens[None], shape)[0]


class Queries(nn.Module):
    """The learnable queries ``[n d]`` of the MetaQuery baseline."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(count, width))


class ContextConnector(nn.Module):
    """Two linear layers from the MLLM's states to what the transformer reads as text (paper, D.1); or none."""

    def __init__(self, config: Mapping[str, Any], width: int):
        super().__init__()
        self.skip, self.identity = config.get("skip", 0), config.get("kind", "mlp") == "identity"
        if self.identity:
            return
        hidden = config["hidden"] or config["expansion"] * width
        self.activation = ACTIVATIONS[config["activation"]]
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, config["out_width"])
        self.norm = nn.RMSNorm(config["out_width"], eps=1e-6) if config["out_norm"] else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """``[b l i]`` to ``[b l o]``."""
        if self.identity:
            return hidden
        return self.norm(self.fc2(self.activation(self.fc1(hidden))))

    def kept(self, mask: Tensor) -> Tensor:
        """The states that the transformer reads: a mask ``[b l]`` without its first ``skip`` real tokens."""
        return mask & (mask.cumsum(1) > self.skip)


class VanillaBlock(nn.Module):
    """Pre-norm transformer block in which all canvas tokens attend to each other."""

    def __init__(self, width: int, head_width: int, hidden: int):
        super().__init__()
        self.head_width = head_width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[b n d]`` to ``[b n d]``."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(GELU_TANH(self.fc1(self.norm2(x))))


class CanvasConnector(nn.Module):
    """``read`` the MLLM's canvas once per prompt, ``add`` it to the patch tokens at every noise level.

    The block that refines the sum is one of diffusers' own, without its cross-attention.
    """

    def __init__(self, config: Mapping[str, Any], mllm_width: int):
        super().__init__()
        width = config["width"]
        small = config["vanilla_width"] or width
        self.before_patchify = config["fuse"] == "before_patchify"
        self.time_scale, self.with_block, self.width = config["time_scale"], config["dit_block"], width
        self.norm = nn.RMSNorm(mllm_width, eps=1e-6)
        self.project = self.block = None
        if config["vanilla_block"]:
            self.project = nn.Linear(mllm_width, small)
            self.block = VanillaBlock(small, config["vanilla_head_width"], int(config["vanilla_ratio"] * small))
        channels = config["latent_channels"] if self.before_patchify else width
        self.zero = nn.Linear(small if config["vanilla_block"] else mllm_width, channels)
        self.time = None
        if config["dit_block"]:
            if config["time_modulation"]:
                self.time = AdaLayerNormSingle(width)
            self.dit = sides.providing("dit", "CanvasBlock").CanvasBlock(
                width, config["head_width"], config["mlp_ratio"]
            )
            self.dit_zero = nn.Linear(width, width)

    def forward(self, hidden: Tensor, grid: Tensor, time: Tensor) -> Tensor:
        """``add(grid, time, read(hidden))``."""
        return self.add(grid, time, self.read(hidden))

    def read(self, hidden: Tensor) -> Tensor:
        """``[b k y x d]`` of the MLLM to ``[b k y x c]``."""
        canvas = self.norm(hidden.flatten(1, 3))
        if self.block is not None:
            canvas = self.block(self.project(canvas))
        return self.zero(canvas).unflatten(1, hidden.shape[1:4])

    def add_to_latents(self, latents: Tensor, canvas: Tensor) -> Tensor:
        """Noisy latents ``[b c t h w]``, with the canvas on them if it is fused before patchification."""
        if not self.before_patchify:
            return latents
        return latents + resize(canvas, latents.shape[2:]).movedim(-1, 1).to(latents.dtype)

    def add(self, grid: Tensor, time: Tensor, canvas: Tensor) -> Tensor:
        """Patch tokens ``[b t h w d]`` with the canvas, refined frame by frame; ``time`` is ``[b]`` or ``[b t]``."""
        if not self.before_patchify:
            grid = grid + resize(canvas, grid.shape[1:4]).to(grid.dtype)
        if not self.with_block:
            return grid
        batch, frames, rows, columns, width = grid.shape
        chunks = grid.new_zeros(batch, 6 * width)
        if self.time is not None:
            last = time if time.ndim == 1 else time[:, -1]
            chunks, _ = self.time(self.time_scale * last, batch_size=batch, hidden_dtype=grid.dtype)
        x = grid.flatten(0, 1).flatten(1, 2)
        x = self.dit(x, timestep=chunks.repeat_interleave(frames, 0), height=rows, width=columns)
        return grid + self.dit_zero(x).reshape(grid.shape).to(grid.dtype)


class Extras(nn.Module):
    """Layers that were added to a published transformer: further input channels, a pooled projection."""

    def __init__(self, extra_in: Mapping[str, Any] | None, pool: Mapping[str, Any] | None):
        super().__init__()
        self.extra_in = self.pool = None
        if extra_in is not None:
            patch = tuple(extra_in["patch"])
            self.extra_in = nn.Conv3d(extra_in["channels"], extra_in["width"], patch, stride=patch, bias=False)
        if pool is not None:
            self.pool = nn.Linear(pool["in_width"], pool["out_width"])


class Connector(nn.Module):
    """Everything in ``connector/``; a part that the config leaves out is None."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width = config["mllm_width"]
        canvas, queries = config["canvas"], config["queries"]
        self.canvas = self.canvas_connector = self.context_connector = self.queries = None
        if canvas is not None:
            self.canvas = CanvasTokens(canvas["keyframes"], canvas["rows"], canvas["columns"], width)
            self.canvas_connector = CanvasConnector(config["canvas_connector"], width)
        if config["context_connector"] is not None:
            self.context_connector = ContextConnector(config["context_connector"], width)
        if queries is not None:
            self.queries = Queries(queries["count"], width)
        self.dit = Extras(config["extra_in"], config["pool"])
