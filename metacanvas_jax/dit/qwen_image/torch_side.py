"""Qwen-Image in PyTorch: ``QwenImageTransformer2DModel`` of diffusers."""

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor
from torch.nn import functional as F

from metacanvas_jax.dit.torch_side import Backbone, Given, Plan, changed_output
from metacanvas_jax.errors import UserError


class Side(Backbone):
    """``QwenImageTransformer2DModel``: packed 2x2 latents, then the references along the sequence."""

    model = QwenImageTransformer2DModel
    adapters = QwenImageLoraLoaderMixin

    @property
    def patch(self) -> tuple[int, int, int]:
        """See ``Backbone``."""
        return (1, 2, 2)

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        if given.first is not None:
            raise UserError("Qwen-Image makes images: it has no first frame")
        images = [latents, *(() if given.source is None else (given.source,)), *given.references]
        images = [image[:, :, 0] for image in images]
        rows, columns = images[0].shape[2] // 2, images[0].shape[3] // 2
        count = rows * columns

        def fuse(tokens: Tensor) -> Tensor:
            grid = self.planned(tokens[:, :count].unflatten(1, (1, rows, columns)), time, plan)
            return torch.cat([grid.flatten(1, 3), tokens[:, count:]], dim=1)

        packed = torch.cat([F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2) for image in images], dim=1)
        states, mask = together(plan.states, plan.mask)
        with changed_output(self.net.img_in, fuse):
            out = self.net(
                packed.to(latents.dtype),
                encoder_hidden_states=states.to(latents.dtype),
                encoder_hidden_states_mask=mask,
                timestep=time,
                img_shapes=[[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * len(latents),
            ).sample
        velocity = out[:, :count].transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(velocity, 2)[:, :, None]


def together(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[b l d]`` that the mask keeps, moved to the front: diffusers numbers them by their place."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return states.gather(1, order[:, :, None].expand(-1, -1, states.shape[2])), mask.gather(1, order)
