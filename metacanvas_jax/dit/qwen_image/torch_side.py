"""Qwen-Image in PyTorch: ``QwenImageTransformer2DModel`` of diffusers."""

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor

from metacanvas_jax.dit.torch_side import Given, Packed, Plan, changed_output


class Side(Packed):
    """``QwenImageTransformer2DModel``: packed 2x2 latents, then the references along the sequence."""

    model = QwenImageTransformer2DModel
    adapters = QwenImageLoraLoaderMixin
    name = "Qwen-Image"

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        packed, sizes = self.packed(latents, given)
        states, mask = together(plan.states, plan.mask)
        with changed_output(self.net.img_in, self.fusing(sizes[0], time, plan)):
            out = self.net(
                packed,
                encoder_hidden_states=states.to(latents.dtype),
                encoder_hidden_states_mask=mask,
                timestep=time,
                img_shapes=[[(1, *size) for size in sizes]] * len(latents),
            ).sample
        return self.unpacked(out, sizes[0])


def together(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[b l d]`` that the mask keeps, moved to the front: diffusers numbers them by their place."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return states.gather(1, order[:, :, None].expand(-1, -1, states.shape[2])), mask.gather(1, order)
