"""FLUX.1 in PyTorch: ``FluxTransformer2DModel`` of diffusers."""

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor

from metacanvas_jax.dit.torch_side import Given, Packed, Plan, changed_output, dynamic
from metacanvas_jax.errors import UserError


class Side(Packed):
    """``FluxTransformer2DModel``: packed 2x2 latents, then the references, each with an index of its own."""

    model = FluxTransformer2DModel
    adapters = FluxLoraLoaderMixin
    name = "FLUX"

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        packed, sizes = self.packed(latents, given)
        ids = [self._ids(i, *size) for i, size in enumerate(sizes)]
        guidance = self.settings["guidance"]
        with changed_output(self.net.x_embedder, self.fusing(sizes[0], time, plan)):
            out = self.net(
                packed,
                encoder_hidden_states=plan.states,
                pooled_projections=self._pooled(plan),
                timestep=time,
                guidance=None if guidance is None else torch.full_like(time, guidance),
                img_ids=torch.cat(ids).to(latents.device),
                txt_ids=torch.zeros(plan.states.shape[1], 3, device=latents.device),
                joint_attention_kwargs=self._mask(plan, packed.shape[1]),
            ).sample
        return self.unpacked(out, sizes[0])

    @staticmethod
    def _ids(index: int, rows: int, columns: int) -> Tensor:
        axes = torch.meshgrid(torch.tensor([index]), torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([axis.flatten() for axis in axes], dim=1).float()

    def _pooled(self, plan: Plan) -> Tensor:
        if self.settings["pooled"] == "learned":
            weight = plan.mask.to(plan.states.dtype)[:, :, None]
            mean = (plan.states * weight).sum(1) / weight.sum(1).clamp(min=1.0)
            return self.connector.dit.pool(mean)
        if self.settings["pooled"] == "zeros":
            return plan.states.new_zeros(len(plan.states), self.net.config.pooled_projection_dim)
        raise UserError("this FLUX was trained with CLIP's pooled vector, which nothing here computes")

    def _mask(self, plan: Plan, images: int) -> dict[str, Tensor] | None:
        if not self.settings["mask_context"]:
            return None
        seen = torch.cat([plan.mask, plan.mask.new_ones(len(plan.mask), images)], dim=1)
        return {"attention_mask": seen[:, None, None]}


def flux_dynamic(steps: int, shift: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """FlowMatchEulerDiscreteScheduler with its own defaults of dynamic shifting."""
    return dynamic(steps, tokens, {})


SCHEDULES = {"flux_dynamic": flux_dynamic}
