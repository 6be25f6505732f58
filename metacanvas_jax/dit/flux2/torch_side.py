"""FLUX.2 in PyTorch: ``Flux2Transformer2DModel`` of diffusers."""

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin
from torch import Tensor

from metacanvas_jax.dit.torch_side import Given, Packed, Plan, changed_output, dynamic, together

REFERENCE_STEP = 10  # between the times of two images


class Side(Packed):
    """``Flux2Transformer2DModel``: a token is a latent; the references follow along the sequence."""

    model = Flux2Transformer2DModel
    adapters = Flux2LoraLoaderMixin
    name = "FLUX.2"
    fold = 1

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        packed, sizes = self.packed(latents, given)
        states, mask = together(plan.states, plan.mask)
        images = [
            ids(torch.tensor([REFERENCE_STEP * i]), torch.arange(rows), torch.arange(columns), torch.arange(1))
            for i, (rows, columns) in enumerate(sizes)
        ]
        one = torch.arange(1)
        seen = torch.cat([mask, mask.new_ones(len(mask), packed.shape[1])], dim=1)
        with changed_output(self.net.x_embedder, self.fusing(sizes[0], time, plan)):
            out = self.net(
                packed,
                encoder_hidden_states=states.to(latents.dtype),
                timestep=time,
                img_ids=torch.cat(images).to(latents.device),
                txt_ids=ids(one, one, one, torch.arange(states.shape[1])).to(latents.device),
                joint_attention_kwargs={"attention_mask": seen[:, None, None]},
            ).sample
        return self.unpacked(out, sizes[0])


def ids(*axes: Tensor) -> Tensor:
    """Rotary ids ``[n 4]`` of the cells of a grid: time, row, column, place in the text."""
    return torch.cartesian_prod(*axes).float()


def empirical_mu(steps: int, tokens: int) -> float:
    """The logarithm of the shift, as the pipeline of diffusers computes it."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def flux2_empirical(steps: int, shift: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """FlowMatchEulerDiscreteScheduler with that shift."""
    mu = empirical_mu(steps, tokens)
    return dynamic(steps, tokens, {"base_shift": mu, "max_shift": mu})


SCHEDULES = {"flux2_empirical": flux2_empirical}
