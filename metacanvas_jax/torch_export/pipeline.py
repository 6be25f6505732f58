"""From a folder written by ``metacanvas export`` to pictures and videos, beside the models it was trained on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metacanvas_jax.dit.torch_side import Backbone, Given, Plan
from metacanvas_jax.errors import UserError
from metacanvas_jax.torch_export import load
from metacanvas_jax.torch_export.connector import Connector
from metacanvas_jax.torch_export.samplers import sample

QUERY_POSITIONS = {"rope": False, "dims": 1, "spacing": 0.0}


@dataclasses.dataclass
class Asked:
    """What a call is about: frames to show to the MLLM (with their rate: a video), and latents given to the DiT."""

    media: list[tuple[list[Image.Image], float | None]]
    given: Given


class MetaCanvasPipeline:
    """Prompts, and images or videos, to images or videos.

    ``mllm`` holds the switch of the adapters (``pipeline.mllm.gate``: "canvas", "everywhere" or "nowhere").
    """

    def __init__(
        self,
        index: Mapping[str, Any],
        connector: Connector,
        mllm: Any,
        text: Any,
        backbone: Backbone,
        vae: Any,
        device: torch.device,
    ):
        self.index, self.connector, self.mllm = index, connector, mllm
        self.text, self.backbone, self.vae, self.device = text, backbone, vae, device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        *,
        mllm: Any = None,
        transformer: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "MetaCanvasPipeline":
        """Loads an exported folder and its bases.

        Args:
            folder: what ``metacanvas export`` wrote.
            base: pipeline folder of diffusers that holds what the export does not: transformer, vae, text_encoder.
            mllm: folder of the MLLM that it was trained beside, or the model itself.
            transformer, vae, text_encoder: folders (or models) of their own, where they do not lie in ``base``.
            dtype: of all networks; sampling itself is float32.
            device: where everything lies.

        Raises:
            UserError: the folder is no export, or a base it needs is missing or of another shape.
        """
        folder, device = Path(folder), torch.device(device)
        index = load.read_index(folder)
        find = load.Finder(folder, index, base, dtype, device)
        connector = find.connector()
        return cls(
            index,
            connector,
            None if index["mllm"] is None else find.mllm(mllm),
            None if index["text"] is None else find.text(text_encoder),
            find.backbone(transformer, connector),
            find.vae(vae),
            device,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | None = None,
        *,
        video: Sequence[Image.Image] | None = None,
        references: Sequence[Image.Image] = (),
        fps: float = 24.0,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        canvas: bool = True,
        seed: int = 0,
        latents: Tensor | None = None,
        given: Given | None = None,
        output: str = "pil",
    ) -> list[Any] | Tensor:
        """Paints one picture (or video: a list of frames) per prompt.

        Args:
            prompt: one, or several.
            image: the picture to edit; for a video, its first frame; shown to the MLLM alone where
                the transformer reads no images.
            video: frames to edit, ``fps`` of them a second.
            references: pictures of what shall appear in the video.
            height, width, frames: in pixels; as in the training unless given.
            steps, guidance: of the sampler; as in the run's config unless given. Guidance 1 is none.
            canvas: whether the plan is painted by; without it the prompt alone speaks.
            seed: same seed, same result.
            latents: noise ``[b c t h w]`` to start from in place of the seed's.
            given: what the transformer reads, already encoded, in place of the autoencoder's reading of the images.
            output: "pil", or "latent" for the latents ``[b c t h w]``.

        Raises:
            UserError: a size that does not divide, or something this backbone cannot read.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        grid, size = self._sizes(height, width, frames)
        frames = grid[0] if latents is None else latents.shape[2]
        asked = self._asked(image, video, references, fps, size, frames, given)
        sampler = dict(self.index["sampler"])
        sampler |= {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        velocity = self._velocity(prompts, asked, sampler["guidance"], canvas)
        if latents is None:
            generator = torch.Generator().manual_seed(seed)
            latents = torch.randn(len(prompts), self.index["latent_channels"], *grid, generator=generator)
        latents = sample(velocity, latents.to(self.device), sampler, self.backbone.tokens(tuple(latents.shape[2:])))
        if asked.given.first is not None:
            latents = torch.cat([asked.given.first.to(latents), latents[:, :, 1:]], dim=2)
        return latents if output == "latent" else self.decode(latents)

    def plan(
        self, prompts: Sequence[str], media: Sequence[Any] = (), *, canvas: bool = True, guided: bool = True
    ) -> Plan:
        """What the transformer reads as text, and the canvas. ``guided`` False: the empty prompt of guidance."""
        parts, written = [], None
        if self.text is not None:
            parts.append(self.text(prompts, instruct=guided))
        if self.mllm is not None:
            inputs = self.mllm.prompts([(media, prompt) for prompt in prompts], self.index["prompt"]).to(self.device)
            context = self.mllm.read(inputs)
            parts += self._context(context)
            if canvas and self.connector.canvas is not None:
                written = self.mllm.write(context, self.connector.canvas(), self.index["canvas"])
                written = self.connector.canvas_connector.read(written)
        states = torch.cat([states for states, _ in parts], dim=1)
        return Plan(states, torch.cat([mask for _, mask in parts], dim=1), written)

    def _context(self, context) -> list[tuple[Tensor, Tensor]]:
        if self.connector.context_connector is None:
            return []
        hidden, mask, queries = context.hidden, context.mask, self.index["queries"]
        if queries is not None:
            tokens = self.connector.queries.tokens[None, None]
            config = QUERY_POSITIONS | {"bidirectional": queries["bidirectional"]}
            read = self.mllm.write(context, tokens, config).flatten(1, 3)
            seen = mask.new_ones(read.shape[:2])
            if queries.get("after_context", True):
                hidden, mask = torch.cat([hidden, read], dim=1), torch.cat([mask, seen], dim=1)
            else:
                hidden, mask = read, seen
        return [(self.connector.context_connector(hidden), mask)]

    def _velocity(
        self, prompts: Sequence[str], asked: Asked, guidance: float, canvas: bool
    ) -> Callable[[Tensor, float], Tensor]:
        media = []
        if self.mllm is not None:
            config = self.index["prompt"]["media"]
            media = [self.mllm.medium(frames, config, rate) for frames, rate in asked.media]
        plan, given = self.plan(prompts, media, canvas=canvas), asked.given
        if guidance == 1.0:
            return lambda z, time: self.backbone.velocity(z, time, plan, given)
        empty = self.plan([""] * len(prompts), media, canvas=canvas, guided=False)

        def guided(z: Tensor, time: float) -> Tensor:
            aimless = self.backbone.velocity(z, time, empty, given)
            return aimless + guidance * (self.backbone.velocity(z, time, plan, given) - aimless)

        return guided

    def _sizes(
        self, height: int | None, width: int | None, frames: int | None
    ) -> tuple[tuple[int, int, int], tuple[int, int]]:
        spatial, temporal = self.index["vae"]["spatial"], self.index["vae"]["temporal"]
        t, h, w = self.index["latents"]
        rows, columns = height or h * spatial, width or w * spatial
        frames = frames or (t - 1) * temporal + 1
        if rows % spatial or columns % spatial or (frames - 1) % temporal:
            raise UserError(
                f"{frames} frames of {rows} x {columns} pixels: expected 1 + {temporal} k frames and sides that are "
                f"multiples of {spatial}"
            )
        return ((frames - 1) // temporal + 1, rows // spatial, columns // spatial), (rows, columns)

    def _asked(
        self,
        image: Image.Image | None,
        video: Sequence[Image.Image] | None,
        references: Sequence[Image.Image],
        fps: float,
        size: tuple[int, int],
        frames: int,
        given: Given | None,
    ) -> Asked:
        """Sorts what was given by the tasks of the paper: who sees it, and how the transformer gets it."""
        if sum((image is not None, video is not None, bool(references))) > 1:
            raise UserError("give one of image, video and references")
        if video is not None:
            every = max(1, round(fps / self.index["prompt"]["video_fps"]))
            shown = [(list(video[::every]), fps / every)]
            return Asked(shown, given or Given(source=self.encode(video, size)))
        if references:
            shown = [([reference], None) for reference in references]
            return Asked(shown, given or Given(references=tuple(self.encode([one], size) for one in references)))
        if image is None:
            return Asked([], given or Given())
        if given is None and self.backbone.sees:
            latents = self.encode([image], size)
            given = Given(first=latents) if frames > 1 else Given(source=latents)
        return Asked([([image], None)], given or Given())

    def encode(self, frames: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Latents of frames, each resized to (rows, columns) of pixels."""
        if self.vae is None:
            raise UserError("reading an image needs the autoencoder: pass vae=FOLDER or base=FOLDER")
        rows, columns = size
        pixels = [
            np.asarray(frame.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC), np.float32)
            for frame in frames
        ]
        video = torch.from_numpy(np.stack(pixels)).movedim(-1, 0)[None] / 127.5 - 1.0
        return self.vae.encode(video.to(self.device, self.backbone.dtype)).float()

    def decode(self, latents: Tensor) -> list[Any]:
        """Pictures of latents ``[b c t h w]``; a list of frames each where t is more than 1."""
        if self.vae is None:
            raise UserError(
                "decoding needs the autoencoder: pass vae=FOLDER or base=FOLDER, or ask for output='latent'"
            )
        pixels = self.vae.decode(latents.to(self.backbone.dtype)).float().clamp(-1, 1)
        pixels = ((pixels + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
        videos = [[Image.fromarray(frame) for frame in video] for video in pixels]
        return [video if len(video) > 1 else video[0] for video in videos]
