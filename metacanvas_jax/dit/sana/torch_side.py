"""SANA in PyTorch: ``SanaTransformer2DModel`` of diffusers."""

import numpy as np
from diffusers import SanaTransformer2DModel
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from metacanvas_jax.dit.torch_side import TRAIN_STEPS, Backbone, Given, Plan, changed_output, shifted, whole_timesteps
from metacanvas_jax.errors import UserError


class Side(Backbone):
    """``SanaTransformer2DModel``: images only."""

    model = SanaTransformer2DModel
    adapters = SanaLoraLoaderMixin
    sees = False

    @property
    def patch(self) -> tuple[int, int, int]:
        """See ``Backbone``."""
        return (1, self.net.config.patch_size, self.net.config.patch_size)

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        if given.source is not None or given.first is not None or given.references:
            raise UserError("SANA reads no image of its own: it can only show one to the MLLM")
        patch = self.net.config.patch_size
        rows, columns = latents.shape[3] // patch, latents.shape[4] // patch

        def fuse(tokens: Tensor) -> Tensor:
            grid = tokens.unflatten(1, (1, rows, columns))
            return self.planned(grid, time, plan).flatten(1, 3)

        with changed_output(self.net.patch_embed, fuse):
            out = self.net(
                latents[:, :, 0],
                encoder_hidden_states=plan.states,
                encoder_attention_mask=plan.mask.to(latents.dtype),
                timestep=self.settings["time_scale"] * time,
            )
        out = out.sample[:, :, None]
        least = self.settings.get("least_time")  # None, or no such key, where the network predicts velocities
        if least is None:
            return out
        return (latents.float() - out.float()) / time.clamp(min=least).view(-1, 1, 1, 1, 1)


class CanvasBlock(SanaTransformerBlock):
    """The block of SANA without cross-attention, which refines the canvas in the canvas connector."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float):
        super().__init__(
            width,
            width // head_width,
            head_width,
            cross_attention_dim=None,
            attention_bias=False,
            mlp_ratio=mlp_ratio,
            norm_eps=1e-6,
        )
        # Without cross-attention the library leaves out the norm of the feed-forward as well.
        self.attn2 = None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def sana_dpm(steps: int, shift: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """DPMSolverMultistepScheduler with flow sigmas; the network gets whole timesteps."""
    sigmas = shifted((1.0 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1))[:0:-1], shift)
    return sigmas, whole_timesteps(sigmas)


SCHEDULES = {"sana_dpm": sana_dpm}
