"""Wan2.2-TI2V in PyTorch: ``WanTransformer3DModel`` of diffusers."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor
from torch.nn import functional as F

from metacanvas_jax.dit.torch_side import TRAIN_STEPS, Backbone, Given, Plan, changed_output, shifted, whole_timesteps


class Side(Backbone):
    """``WanTransformer3DModel``: references stand in front in time, noise levels are per token where they differ."""

    model = WanTransformer3DModel
    adapters = WanLoraLoaderMixin

    @property
    def patch(self) -> tuple[int, int, int]:
        """See ``Backbone``."""
        return tuple(self.net.config.patch_size)

    def velocity(self, latents: Tensor, time: float, plan: Plan, given: Given) -> Tensor:
        """With a given first frame, that frame is clean, at noise level 0, and the sampler's own copy is ignored."""
        if given.first is None:
            return super().velocity(latents, time, plan, given)
        latents = torch.cat([given.first.to(latents), latents[:, :, 1:]], dim=2)
        if plan.canvas is not None:
            latents = self.connector.canvas_connector.add_to_latents(latents, plan.canvas)
        level = torch.full((len(latents), latents.shape[2]), time, device=latents.device)
        level[:, 0] = 0.0
        return self.run(latents.to(self.dtype), level, plan, given).to(latents.dtype)

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        extra = self.connector.dit.extra_in
        references = [*given.references]
        if given.source is not None and extra is None:
            references.insert(0, given.source)
        frames = torch.cat([*(image.to(latents) for image in references), latents], dim=2)
        clean = frames.shape[2] - latents.shape[2]
        states, mask = plan.states, plan.mask
        if not self.settings["mask_context"]:  # hidden text is zero, and attended to, as in the published pipeline
            states, mask = states * mask[:, :, None].to(states.dtype), None

        def fuse(grid: Tensor) -> Tensor:
            if extra is not None:
                grid = grid + extra(self._channels(latents, given).to(grid.dtype))
            grid = grid.movedim(1, -1)
            noisy = self.planned(grid[:, clean:], time, plan)
            return torch.cat([grid[:, :clean], noisy], dim=1).movedim(-1, 1)

        level = time
        if clean or time.ndim == 2:
            level = time if time.ndim == 2 else time[:, None].expand(-1, latents.shape[2])
            level = F.pad(level, (clean, 0))
            _, height, width = self.net.config.patch_size
            per_frame = (latents.shape[3] // height) * (latents.shape[4] // width)
            level = level.repeat_interleave(per_frame, dim=1)
        with changed_output(self.net.patch_embedding, fuse), self._masked(mask):
            out = self.net(frames, timestep=1000.0 * level, encoder_hidden_states=states)
        return out.sample[:, :, clean:]

    @staticmethod
    def _channels(latents: Tensor, given: Given) -> Tensor:
        """Given latents on their frames, zeros elsewhere, and a channel of ones where something is given."""

        def marked(z: Tensor, mark: float) -> Tensor:
            return torch.cat([z.to(latents), torch.full_like(z[:, :1], mark).to(latents)], dim=1)

        if given.source is not None:
            frames = marked(given.source, 1.0)
        else:
            frames = marked(torch.zeros_like(latents), 0.0)
            if given.first is not None:
                frames = torch.cat([marked(given.first, 1.0), frames[:, :, 1:]], dim=2)
        return torch.cat([*(marked(image, 1.0) for image in given.references), frames], dim=2)

    @contextlib.contextmanager
    def _masked(self, mask: Tensor | None) -> Iterator[None]:
        """The transformer's forward has no mask for its text, but its cross-attentions have."""
        handles = []
        if mask is not None:
            put = lambda _, arguments: (*arguments[:2], mask[:, None, None], *arguments[3:])  # noqa: E731
            handles = [block.attn2.register_forward_pre_hook(put) for block in self.net.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def wan_unipc(steps: int, shift: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """UniPCMultistepScheduler with flow sigmas: starts 1e-6 below 1; the network gets whole timesteps."""
    sigmas = shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return sigmas, whole_timesteps(sigmas)


SCHEDULES = {"wan_unipc": wan_unipc}
