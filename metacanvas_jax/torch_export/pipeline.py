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
from metacanvas_jax.sizes import canvas_grid
from metacanvas_jax.torch_export import load, reading
from metacanvas_jax.torch_export.connector import Connector
from metacanvas_jax.torch_export.reading import Rules, Shape
from metacanvas_jax.torch_export.samplers import sample, with_norms_of

QUERY_POSITIONS = {"rope": False, "dims": 1, "spacing": 0.0}


@dataclasses.dataclass
class Asked:
    """What a call asks for: the shape of the result, media of the MLLM, and latents that the transformer reads."""

    shape: Shape
    media: Sequence[Any]
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
        self.rules = Rules(index, backbone.patch)

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
        with load.described(folder):
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
            image: the picture to edit, or the first frame of a video. A transformer that reads no images leaves it to
                the MLLM. It is shared by all prompts, and so are ``video`` and ``references``.
            video: frames to edit, ``fps`` of them a second.
            references: pictures of what shall appear in the video.
            height, width, frames: of the result, in pixels; as in the training unless given, and for an edit of the
                aspect ratio of what is edited.
            steps, guidance: of the sampler; as in the run's config unless given. Guidance 1 is none.
            canvas: whether the plan is painted by; without it the prompt alone speaks.
            seed: same seed, same result.
            latents: noise ``[b c t h w]`` to start from in place of the seed's; its shape is that of the result.
            given: what the transformer reads, already encoded, in place of the autoencoder's reading of the images.
            output: "pil", or "latent" for the latents ``[b c t h w]``.

        Raises:
            UserError: a size that does not divide, something this backbone cannot read, a seed that is none, or a
                result that is not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if latents is not None:
            height, width = (self.rules.spatial * side for side in latents.shape[3:])
            frames = (latents.shape[2] - 1) * self.rules.temporal + 1
        asked = self._asked(image, video, references, fps, {"height": height, "width": width, "frames": frames}, given)
        grid = self.rules.grid(asked.shape)
        asked.given = repeated(asked.given, len(prompts))
        sampler = dict(self.index["sampler"])
        sampler |= {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        velocity = self._velocity(prompts, asked, sampler["guidance"], canvas)
        if latents is None:
            latents = self.noise(len(prompts), grid, seed)
        latents = sample(velocity, latents.to(self.device), sampler, self.backbone.tokens(grid))
        if asked.given.first is not None:
            latents = torch.cat([asked.given.first.to(latents), latents[:, :, 1:]], dim=2)
        return latents if output == "latent" else self.decode(latents)

    def noise(self, count: int, grid: tuple[int, int, int], seed: int) -> Tensor:
        """Noise ``[count c *grid]``. Raises UserError for a seed outside of 0 to 2^64 - 1."""
        if not 0 <= seed < 1 << 64:
            raise UserError(f"the seed is {seed}, expected a number from 0 to {(1 << 64) - 1}")
        shape = (count, self.index["latent_channels"], *grid)
        if seed >> 32:  # torch's generator takes 32 bits of a seed
            return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def plan(
        self,
        prompts: Sequence[str],
        media: Sequence[Any] = (),
        *,
        shape: Shape | None = None,
        canvas: bool = True,
        guided: bool = True,
    ) -> Plan:
        """What the transformer reads as text, and the canvas of a shape (None: the trained one).

        ``guided`` False: ``prompts`` are the empty ones of guidance.
        """
        shape = self.rules.shapes[0] if shape is None else shape
        parts, written = [], None
        if self.text is not None:
            parts.append(self.text(prompts, [guided] * len(prompts)))
        if self.mllm is not None:
            config = self.index["prompt"] | {"length": shape.length}
            inputs = self.mllm.prompts([(media, prompt) for prompt in prompts], config).to(self.device)
            context = self.mllm.read(inputs)
            parts += self._context(context)
            if canvas and self.connector.canvas is not None:
                table, config = self.connector.canvas.tokens.shape[:3], self.index["canvas"]
                # Exports from before this key have a canvas of one size.
                grid = canvas_grid(table, self.rules.grid(shape), config.get("latents_per_cell"))
                written = self.mllm.write(context, self.connector.canvas(grid), config)
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
        return [(self.connector.context_connector(hidden), self.connector.context_connector.kept(mask))]

    def _velocity(
        self, prompts: Sequence[str], asked: Asked, guidance: float, canvas: bool
    ) -> Callable[[Tensor, float], Tensor]:
        media, shape = [], asked.shape
        if self.mllm is not None:
            config = self.index["prompt"]["media"]
            media = [self.mllm.medium(frames, config, rate) for frames, rate in asked.media]
        plan, given = self.plan(prompts, media, shape=shape, canvas=canvas), asked.given
        if guidance == 1.0:
            return lambda z, time: self.backbone.velocity(z, time, plan, given)
        empty = self.plan([""] * len(prompts), media, shape=shape, canvas=canvas, guided=False)

        def guided(z: Tensor, time: float) -> Tensor:
            aimless = self.backbone.velocity(z, time, empty, given)
            aimed = self.backbone.velocity(z, time, plan, given)
            combined = aimless + guidance * (aimed - aimless)
            rescale = self.index["sampler"].get("rescale", False)
            return with_norms_of(aimed, combined, self.backbone.patch) if rescale else combined

        return guided

    def _asked(
        self,
        image: Image.Image | None,
        video: Sequence[Image.Image] | None,
        references: Sequence[Image.Image],
        fps: float,
        size: Mapping[str, int | None],
        given: Given | None,
    ) -> Asked:
        """Sorts what was given by the tasks of the paper: who sees it, and how the transformer gets it."""
        if sum((image is not None, video is not None, bool(references))) > 1:
            raise UserError("give one of image, video and references")
        moves = self.rules.makes_video(size["frames"])
        if video is not None:
            first = reading.picture(video[0])
            shape = self.rules.shape("video_editing", source=first, **size)
            frames = [video[i] for i in reading.clip(len(video), fps, shape.frames, shape.fps)]
            frames = self._pictures(frames, shape)
            chosen, rate = reading.shown_frames(len(frames), shape.fps, self.rules.frames)
            media = [([frames[i] for i in chosen], rate)]
            return Asked(shape, media, given or Given(source=self.encode(frames, shape.size)))
        if references:
            shape = self.rules.shape("reference_to_video" if moves else "image_editing", **size)
            pictures = self._pictures(references, shape)
            media = [([picture], None) for picture in pictures]
            given = given or Given(references=tuple(self.encode([picture], shape.size) for picture in pictures))
            return Asked(shape, media, given)
        if image is None:
            return Asked(self.rules.shape("text_to_video" if moves else "text_to_image", **size), [], given or Given())
        source = reading.picture(image)
        shape = self.rules.shape("image_to_video" if moves else "image_editing", source=source, **size)
        source = reading.fit(source, shape.size)
        if given is None and self.backbone.sees:
            latents = self.encode([source], shape.size)
            given = Given(first=latents) if moves else Given(source=latents)
        return Asked(shape, [([source], None)], given or Given())

    @staticmethod
    def _pictures(frames: Sequence[Image.Image], shape: Shape) -> list[Image.Image]:
        return [reading.fit(reading.picture(frame), shape.size) for frame in frames]

    def encode(self, frames: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Latents ``[1 c t h w]`` of pictures, each upright and cropped to (rows, columns) of pixels."""
        if self.vae is None:
            raise UserError("reading an image needs the autoencoder: pass vae=FOLDER or base=FOLDER")
        pixels = [np.asarray(reading.fit(reading.picture(frame), size), np.float32) for frame in frames]
        video = torch.from_numpy(np.stack(pixels)).movedim(-1, 0)[None] / 127.5 - 1.0
        return self.vae.encode(video.to(self.device, self.backbone.dtype)).float()

    def decode(self, latents: Tensor) -> list[Any]:
        """Pictures of latents ``[b c t h w]``; a list of frames each where t is more than 1.

        Raises UserError for NaN and infinity, which would become black.
        """
        if self.vae is None:
            raise UserError(
                "decoding needs the autoencoder: pass vae=FOLDER or base=FOLDER, or ask for output='latent'"
            )
        pixels = self.vae.decode(latents.to(self.backbone.dtype)).float()
        if bad := int((~torch.isfinite(pixels)).sum()):
            raise UserError(
                f"{bad} of {pixels.numel()} values of the result are not finite; "
                "a smaller guidance, more steps or float32 may help"
            )
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
        videos = [[Image.fromarray(frame) for frame in video] for video in pixels]
        return [video if len(video) > 1 else video[0] for video in videos]


def repeated(given: Given, count: int) -> Given:
    """Latents that were given once, for each of ``count`` prompts."""

    def each(latents: Tensor | None) -> Tensor | None:
        return latents if latents is None or len(latents) == count else latents.expand(count, -1, -1, -1, -1)

    return Given(each(given.source), each(given.first), tuple(map(each, given.references)))
