"""The three diffusion transformers of diffusers, with the canvas added to the output of their patch embedding.

Latents are ``[b c t h w]`` (an image has t = 1), noise levels lie in [0, 1], and a velocity is noise minus data.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacanvas_jax.errors import UserError
from metacanvas_jax.torch_export.connector import Connector


@dataclasses.dataclass
class Plan:
    """What the transformer reads as text, and the canvas in its width (None without one)."""

    states: Tensor  # [b l d]
    mask: Tensor  # [b l]
    canvas: Tensor | None = None  # [b k y x d]


@dataclasses.dataclass
class Given:
    """Clean latents that a task gives: the source of an edit, the first frame of a video, or references."""

    source: Tensor | None = None  # [b c t h w]
    first: Tensor | None = None  # [b c 1 h w]
    references: tuple[Tensor, ...] = ()  # [b c 1 h w] each


@contextlib.contextmanager
def changed_output(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what ``layer`` returns goes through ``change``."""
    handle = layer.register_forward_hook(lambda _, arguments, output: change(output))
    try:
        yield
    finally:
        handle.remove()


class Backbone:
    """A transformer, the connector, and what both must agree on (``settings`` of the exported folder)."""

    def __init__(
        self, net: nn.Module, connector: Connector, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32
    ):
        self.net: Any = net  # diffusers' classes, whose parts torch's types do not know
        self.connector, self.settings, self.dtype = connector, settings, dtype

    def velocity(self, latents: Tensor, time: float, plan: Plan, given: Given) -> Tensor:
        """The velocity of ``latents`` at noise level ``time``."""
        if plan.canvas is not None:
            latents = self.connector.canvas_connector.add_to_latents(latents, plan.canvas)
        level = torch.full(latents.shape[:1], time, device=latents.device)
        return self.run(latents.to(self.dtype), level, plan, given).to(latents.dtype)

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """The network itself."""
        raise TypeError(f"{type(self).__name__} has no network")

    def planned(self, grid: Tensor, time: Tensor, plan: Plan) -> Tensor:
        """Patch tokens ``[b t h w d]`` with the canvas on them."""
        if plan.canvas is None:
            return grid
        return self.connector.canvas_connector.add(grid, time, plan.canvas)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Number of latent cells, which FLUX's schedule is made for."""
        return grid[0] * grid[1] * grid[2]


class Sana(Backbone):
    """``SanaTransformer2DModel``: images only."""

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
        return out.sample[:, :, None]


class Flux(Backbone):
    """``FluxTransformer2DModel``: packed 2x2 latents, then the references, each with an index of its own."""

    def run(self, latents: Tensor, time: Tensor, plan: Plan, given: Given) -> Tensor:
        """See ``Backbone``."""
        if given.first is not None:
            raise UserError("FLUX makes images: it has no first frame")
        images = [latents, *(() if given.source is None else (given.source,)), *given.references]
        images = [image[:, :, 0] for image in images]
        rows, columns = images[0].shape[2] // 2, images[0].shape[3] // 2
        count = rows * columns

        def fuse(tokens: Tensor) -> Tensor:
            grid = self.planned(tokens[:, :count].unflatten(1, (1, rows, columns)), time, plan)
            return torch.cat([grid.flatten(1, 3), tokens[:, count:]], dim=1)

        packed = torch.cat([F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2) for image in images], dim=1)
        ids = [self._ids(i, image.shape[2] // 2, image.shape[3] // 2) for i, image in enumerate(images)]
        guidance = self.settings["guidance"]
        with changed_output(self.net.x_embedder, fuse):
            out = self.net(
                packed.to(latents.dtype),
                encoder_hidden_states=plan.states,
                pooled_projections=self._pooled(plan),
                timestep=time,
                guidance=None if guidance is None else torch.full_like(time, guidance),
                img_ids=torch.cat(ids).to(latents.device),
                txt_ids=torch.zeros(plan.states.shape[1], 3, device=latents.device),
                joint_attention_kwargs=self._mask(plan, packed.shape[1]),
            ).sample
        velocity = out[:, :count].transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(velocity, 2)[:, :, None]

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


class Wan(Backbone):
    """``WanTransformer3DModel``: references stand in front in time, noise levels are per token where they differ."""

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


BACKBONES: dict[str, type[Backbone]] = {"sana": Sana, "flux": Flux, "wan": Wan}
