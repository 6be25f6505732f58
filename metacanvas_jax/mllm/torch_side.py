"""What the MLLMs share in PyTorch: prompts, media as patches, positions; read once and then written on (paper, 3.2).

The torch side of each MLLM is the class ``Side`` of ``torch_side.py`` in its folder.
"""

import dataclasses
import inspect
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast

from metacanvas_jax.errors import UserError
from metacanvas_jax.images import to_rgb
from metacanvas_jax.mllm.template import CHAT

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Medium:
    """An image, or a video whose temporal patches are ``seconds`` apart and stand for the moments ``times``."""

    patches: np.ndarray  # [p q]
    grid: tuple[int, int, int]  # in patches
    seconds: float | None = None
    times: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of placeholders: the words before it, the placeholder, its merged tokens and their step of time."""

    words: str
    pad: str
    grid: tuple[int, int, int]
    step: float = 1.0

    @property
    def count(self) -> int:
        """Placeholders of the block."""
        return math.prod(self.grid)


@dataclasses.dataclass
class Inputs:
    """A batch of prompts, padded on the right; ``media`` are patches, grid ``[1 3]`` and (rows, columns) of tokens."""

    tokens: Tensor  # [b l]
    positions: Tensor  # [3 b l]
    mask: Tensor  # [b l]
    media: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]

    def to(self, device: torch.device) -> "Inputs":
        """The batch on a device."""
        media = [(p.to(device), g.to(device), (i.to(device), j.to(device))) for p, g, (i, j) in self.media]
        return Inputs(self.tokens.to(device), self.positions.to(device), self.mask.to(device), media)


@dataclasses.dataclass
class Context:
    """What the MLLM made of a prompt, and its keys and values, against which the canvas is written."""

    hidden: Tensor  # [b l d], after the final norm
    mask: Tensor  # [b l], True on real tokens
    cache: DynamicCache
    next_position: Tensor  # [b]


class Side:
    """An MLLM of transformers, and the adapters that act on what is written.

    ``gate`` says where the adapters act: "canvas" (as they were trained), "everywhere" or "nowhere". ``model`` is the
    class of transformers. ``frames_apart`` says whether every keyframe of a canvas is a block of its own. Exports of
    version 0.1 name no MLLM: theirs is the one that says ``unnamed``.

    The language model is called with embeddings, explicit positions ``[3 b n]`` and an explicit mask: given embeddings
    without positions, transformers would silently number the canvas like text.
    """

    model: Any
    frames_apart = unnamed = False

    def __init__(self, net: nn.Module, tokenizer: PreTrainedTokenizerFast, adapters: Any = None, gate: str = "canvas"):
        self.net: Any = net
        self.tokenizer, self.adapters, self.gate = tokenizer, adapters, gate
        self._language = self.net.model.language_model
        parameters = inspect.signature(type(self._language).forward).parameters
        self._cache = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24

    def prompts(self, prompts: Sequence[tuple[Sequence[Medium], str]], config: Mapping[str, Any]) -> Inputs:
        """A batch of prompts, each its media followed by its text (see ``build``)."""
        return build(self.tokenizer, prompts, config)

    def medium(self, frames: Sequence[Image.Image], config: Mapping[str, Any], fps: float | None = None) -> Medium:
        """An image, or a video of ``fps`` frames a second, as this MLLM reads it."""
        return read_medium(frames, config, fps)

    @torch.no_grad()
    def read(self, inputs: Inputs) -> Context:
        """Reads prompts with their media."""
        embeddings = self._language.embed_tokens(inputs.tokens)
        seen = [self.net.model.visual(p.to(embeddings.dtype), grid_thw=grid) for p, grid, _ in inputs.media]
        for out, (_, _, places) in zip(seen, inputs.media, strict=True):
            embeddings[places] = out.pooler_output.to(embeddings.dtype)
        length = inputs.tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=inputs.mask.device).tril()
        mask, cache = causal & inputs.mask[:, None], DynamicCache()
        added = self.added(seen, [places for _, _, places in inputs.media], embeddings)
        hidden = self._run(embeddings, inputs.positions, mask, cache, self.gate == "everywhere", added)
        last = inputs.positions.masked_fill(~inputs.mask, -1).amax((0, 2))
        return Context(hidden, inputs.mask, cache, last + 1)

    @torch.no_grad()
    def write(self, context: Context, tokens: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Hidden states ``[b k y x d]`` of learnable tokens ``[k y x d]`` that follow a context."""
        batch, shape = len(context.mask), tokens.shape[:3]
        positions = canvas_positions(context.next_position, tuple(shape), config, self.frames_apart)
        tokens = tokens.flatten(0, 2).to(context.hidden.dtype).expand(batch, -1, -1)
        count = tokens.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
        seen = seen if config["bidirectional"] else seen.tril()
        mask = torch.cat([context.mask[:, None].expand(-1, count, -1), seen.expand(batch, -1, -1)], dim=2)
        hidden = self._run(tokens, positions, mask, context.cache, self.gate != "nowhere")
        context.cache.crop(-count)  # the context stays as it was read
        return hidden.unflatten(1, shape)

    def added(self, seen: Sequence[Any], places: Sequence[Any], embeddings: Tensor) -> dict[str, Any]:
        """Further arguments of the language model, from what the vision tower made of the media in these places."""
        del seen, places, embeddings
        return {}

    def masked(self, mask: Tensor, dtype: torch.dtype) -> Any:
        """A mask ``[b n m]``, True where attention may look, in the form that the language model takes."""
        return additive(mask, dtype)

    def _run(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: DynamicCache,
        adapted: bool,
        added: Mapping[str, Any] | None = None,
    ) -> Tensor:
        call = {
            "inputs_embeds": embeddings,
            "position_ids": positions,
            "attention_mask": self.masked(mask, embeddings.dtype),
            "use_cache": True,
            self._cache: cache,
            **(added or {}),
        }
        if self.adapters is None:
            return self._language(**call).last_hidden_state
        with self.adapters.switched(adapted):
            return self._language(**call).last_hidden_state


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask ``[b n m]``, True where attention may look, as transformers adds it to its scores."""
    blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return blocked.masked_fill(~mask, torch.finfo(dtype).min)[:, None]


def canvas_positions(
    start: Tensor, shape: tuple[int, int, int], config: Mapping[str, Any], frames_apart: bool = False
) -> Tensor:
    """Positions ``[3 b n]`` of a canvas in raster order: those of an image (one keyframe) or of a video.

    With ``frames_apart`` each keyframe begins one after the largest position of the one before.
    """
    k, y, x = shape
    count = k * y * x
    if not config["rope"]:
        offsets = torch.arange(count, device=start.device).expand(3, count)
    else:
        grid = {1: (1, 1, count), 2: (1, k * y, x), 3: (k, y, x)}[config["dims"]]
        axes = torch.meshgrid(*(torch.arange(side, device=start.device) for side in grid), indexing="ij")
        time, rows, columns = (axis.flatten() for axis in axes)
        if frames_apart:
            offsets = torch.stack([torch.zeros_like(time), rows, columns]) + time * max(grid[1:])
        else:
            offsets = torch.stack([(time.float() * config["spacing"]).floor().long(), rows, columns])
    return offsets[:, None] + start[None, :, None]


def target_size(height: int, width: int, config: Mapping[str, Any], frames: int | None = None) -> tuple[int, int]:
    """Sides that are multiples of a merged token, within the config's token budget or limits of pixels.

    ``frames`` are those of a video (None: an image). Limits hold for one of them, or with ``whole_video`` for all.
    """
    unit = config["patch"] * config["merge"]
    if config["tokens"] is not None:
        budget = config["tokens"]
        # Of all numbers of rows, the one whose aspect ratio is the nearest.
        rows = min(range(1, budget + 1), key=lambda rows: abs(math.log(budget // rows * height / (rows * width))))
        return rows * unit, budget // rows * unit
    (low, high), count, whole = config["image_pixels" if frames is None else "video_pixels"], 1, 1
    if frames is not None and config.get("whole_video"):
        count, depth = frames, config["temporal_patch"]
        whole = max(1, round(frames / depth)) * depth
        if 0 < min(height, width) < unit:
            scale = unit / min(height, width)
            height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / unit), round(width / unit)
    if whole * rows * columns * unit**2 > high:
        shrink = math.sqrt(count * height * width / high) * unit
        rows, columns = max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
    elif whole * rows * columns * unit**2 < low:
        grow = math.sqrt(low / (count * height * width)) / unit
        rows, columns = math.ceil(height * grow), math.ceil(width * grow)
    return rows * unit, columns * unit


def read_medium(frames: Sequence[Image.Image], config: Mapping[str, Any], fps: float | None = None) -> Medium:
    """Frames as patches, four of each merged token in a row, values ordered channel, time, row, column."""
    rows, columns = target_size(frames[0].height, frames[0].width, config, None if fps is None else len(frames))
    pixels = []
    for frame in frames:
        frame = to_rgb(frame)
        if frame.size != (columns, rows):
            frame = frame.resize((columns, rows), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(frame, np.float32) / np.float32(255) - np.float32(config["mean"]))
    video = np.stack(pixels) / np.float32(config["std"])
    depth, patch, merge = config["temporal_patch"], config["patch"], config["merge"]
    video = np.concatenate([video, *[video[-1:]] * (-len(video) % depth)])
    t, h, w = len(video) // depth, rows // patch, columns // patch
    cut = video.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    patches = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    if fps is None:
        return Medium(patches, (t, h, w))
    moments = [frame / fps for frame in range(len(frames))]
    moments += moments[-1:] * (-len(moments) % depth)
    times = tuple((moments[i] + moments[i + depth - 1]) / 2 for i in range(0, len(moments), depth))
    return Medium(patches, (t, h, w), depth / fps, times)


def shown(medium: Medium, config: Mapping[str, Any], chat: Mapping[str, str]) -> list[Block]:
    """The blocks of a medium in a prompt: one, or with timestamps one for each temporal patch of a video."""
    media = config["media"]
    (t, *sides), pad = medium.grid, chat["image" if medium.seconds is None else "video"]
    h, w = (side // media["merge"] for side in sides)
    if medium.seconds is None or not media.get("timestamps"):
        step = 1.0 if medium.seconds is None else config["tokens_per_second"] * medium.seconds
        return [Block("", pad, (t, h, w), step)]
    return [Block(chat["time"].format(time), pad, (1, h, w)) for time in medium.times]


def build(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[tuple[Sequence[Medium], str]], config: Mapping[str, Any]
) -> Inputs:
    """A batch of prompts, each its media followed by its text, padded to ``config["length"]``.

    Special tokens that a text spells are plain text. Raises UserError for media that are too long.
    """
    chat = config.get("template", CHAT)
    rows, media = [], []
    for number, (own, text) in enumerate(prompts):
        blocks = [shown(medium, config, chat) for medium in own]
        pads = [
            (f"{label}{block.words}", f"{chat['vision_start']}{block.pad * block.count}{chat['vision_end']}")
            for label, parts in zip(labels(own, config), blocks, strict=True)
            for block in parts
        ]
        ids, at = np.asarray(turn(tokenizer, pads, text, config)), 0
        starts = []
        for medium, parts in zip(own, blocks, strict=True):
            columns = []
            for block in parts:
                at += int(np.argmax(ids[at:] == tokenizer.convert_tokens_to_ids(block.pad)))
                starts.append((at, block))
                columns.append(torch.arange(at, at + block.count))
                at += block.count
            columns = torch.cat(columns)
            places = (torch.full_like(columns, number), columns)
            media.append((torch.from_numpy(medium.patches), torch.tensor([medium.grid]), places))
        rows.append((ids, positions(len(ids), starts)))
    shape = len(rows), config["length"]
    tokens = torch.full(shape, tokenizer.convert_tokens_to_ids(chat["padding"]))
    places, mask = torch.zeros((3, *shape), dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, (ids, own) in enumerate(rows):
        tokens[i, : len(ids)], places[:, i, : len(ids)] = torch.from_numpy(ids), torch.from_numpy(own)
        mask[i, : len(ids)] = True
    return Inputs(tokens, places, mask, media)


def labels(media: Sequence[Medium], config: Mapping[str, Any]) -> list[str]:
    """The text before each medium: that of the config with the number of the image, nothing before a video."""
    label, numbers = config.get("image_label", ""), itertools.count(1)
    return [label.format(next(numbers)) if medium.seconds is None else "" for medium in media]


def turn(
    tokenizer: PreTrainedTokenizerFast, media: Sequence[tuple[str, str]], text: str, config: Mapping[str, Any]
) -> list[int]:
    """Tokens of a prompt of media, each the words before it and its placeholders, and text.

    A prompt that is longer than ``config["length"]`` loses its last words, and a warning says so. Raises UserError when
    the media alone are too long.
    """
    chat, system = config.get("template", CHAT), ""
    if config["system"] is not None:
        system = f"{chat['start']}{chat['system']}{config['system']}{chat['end']}{chat['between']}"
    encode = partial(tokenizer, add_special_tokens=False)
    opened = f"{chat['between']}{chat['start']}{chat['assistant']}" if config.get("assistant") else ""
    head, end = encode(f"{system}{chat['start']}").input_ids, encode(f"{chat['end']}{opened}").input_ids

    def written(text: str) -> list[int]:
        ids, run = list(head), chat["user"]
        for words, shown in media:
            ids += [*encode(f"{run}{words}", split_special_tokens=True).input_ids, *encode(shown).input_ids]
            run = ""
        return [*ids, *encode(f"{run}{text}", split_special_tokens=True).input_ids, *end]

    whole = written(text)
    ids, length = whole, config["length"]
    while len(ids) > length and text:
        offsets = encode(text, split_special_tokens=True, return_offsets_mapping=True).offset_mapping
        text = cut(text, offsets, len(offsets) - (len(ids) - length))
        ids = written(text)
    if len(ids) > length:
        raise UserError(f"the media of a prompt need {len(ids)} tokens, at most {length} fit")
    if ids is not whole:
        logger.warning("a prompt of %d tokens loses its last words: at most %d fit", len(whole), length)
    return ids


def cut(text: str, offsets: Sequence[tuple[int, int]], count: int) -> str:
    """The beginning of a text that has at most its first ``count`` tokens, whole characters only, always shorter."""
    if count <= 0:
        return ""
    return text[: min(offsets[count - 1][1], offsets[count][0], len(text) - 1)].strip()


def positions(length: int, blocks: Sequence[tuple[int, Block]]) -> np.ndarray:
    """Positions ``[3 n]`` (time, height, width): text counts up; what follows a block starts one after its largest."""
    out, start, at = np.zeros((3, length), np.int64), 0, 0
    for place, medium in blocks:
        out[:, at:place] = np.arange(start, start + place - at)
        start += place - at
        t, h, w = medium.grid
        time = np.floor(np.arange(t, dtype=np.float32) * np.float32(medium.step)).astype(np.int64)
        block = np.stack(np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)
        at = place + block.shape[1]
        out[:, place:at] = start + block
        start += int(block.max()) + 1
    out[:, at:] = np.arange(start, start + length - at)
    return out
