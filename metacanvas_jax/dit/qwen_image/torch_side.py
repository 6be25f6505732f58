"""Qwen-Image in PyTorch: ``QwenImageTransformer2DModel`` of diffusers."""

from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor

from metacanvas_jax.dit.torch_side import Given, Packed, Plan, changed_output, together


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
