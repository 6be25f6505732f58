"""Qwen2.5-VL of transformers: chat template, media as patches, positions; read once and then written on (paper, 3.2).

The language model is called with embeddings, explicit positions ``[3 b n]`` and an explicit mask: given embeddings
without positions, transformers would silently number the canvas like text.
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
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.template import CHAT
from metacanvas_jax.mllm.torch_side import Context, Inputs, additive, canvas_positions

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Medium:
    """An image, or a video whose temporal patches are ``seconds`` apart."""

    patches: np.ndarray  # [p q]
    grid: tuple[int, int, int]  # in patches
    seconds: float | None = None


class Side:
    """A ``Qwen2_5_VLForConditionalGeneration``, and the adapters that act on what is written.

    ``gate`` says where the adapters act: "canvas" (as they were trained), "everywhere" or "nowhere".
    """

    model, unnamed = Qwen2_5_VLForConditionalGeneration, True

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
        for patches, grid, places in inputs.media:
            features = self.net.model.visual(patches.to(embeddings.dtype), grid_thw=grid).pooler_output
            embeddings[places] = features.to(embeddings.dtype)
        length = inputs.tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=inputs.mask.device).tril()
        cache = DynamicCache()
        hidden = self._run(
            embeddings, inputs.positions, causal & inputs.mask[:, None], cache, self.gate == "everywhere"
        )
        last = inputs.positions.masked_fill(~inputs.mask, -1).amax((0, 2))
        return Context(hidden, inputs.mask, cache, last + 1)

    @torch.no_grad()
    def write(self, context: Context, tokens: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Hidden states ``[b k y x d]`` of learnable tokens ``[k y x d]`` that follow a context."""
        batch, shape = len(context.mask), tokens.shape[:3]
        positions = canvas_positions(context.next_position, tuple(shape), config)
        tokens = tokens.flatten(0, 2).to(context.hidden.dtype).expand(batch, -1, -1)
        count = tokens.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
        seen = seen if config["bidirectional"] else seen.tril()
        mask = torch.cat([context.mask[:, None].expand(-1, count, -1), seen.expand(batch, -1, -1)], dim=2)
        hidden = self._run(tokens, positions, mask, context.cache, self.gate != "nowhere")
        context.cache.crop(-count)  # the context stays as it was read
        return hidden.unflatten(1, shape)

    def _run(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache, adapted: bool) -> Tensor:
        call = {
            "inputs_embeds": embeddings,
            "position_ids": positions,
            "attention_mask": {"full_attention": additive(mask, embeddings.dtype)},
            "use_cache": True,
            self._cache: cache,
        }
        if self.adapters is None:
            return self._language(**call).last_hidden_state
        with self.adapters.switched(adapted):
            return self._language(**call).last_hidden_state


def target_size(height: int, width: int, config: Mapping[str, Any], video: bool) -> tuple[int, int]:
    """Sides that are multiples of a merged token, within the config's token budget or limits of pixels."""
    unit = config["patch"] * config["merge"]
    if config["tokens"] is not None:
        budget = config["tokens"]
        # Of all numbers of rows, the one whose aspect ratio is the nearest.
        rows = min(range(1, budget + 1), key=lambda rows: abs(math.log(budget // rows * height / (rows * width))))
        return rows * unit, budget // rows * unit
    low, high = config["video_pixels" if video else "image_pixels"]
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > high:
        shrink = math.sqrt(height * width / high) * unit
        rows, columns = max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
    elif rows * columns * unit**2 < low:
        grow = math.sqrt(low / (height * width)) / unit
        rows, columns = math.ceil(height * grow), math.ceil(width * grow)
    return rows * unit, columns * unit


def read_medium(frames: Sequence[Image.Image], config: Mapping[str, Any], fps: float | None = None) -> Medium:
    """Frames as patches, four of each merged token in a row, values ordered channel, time, row, column."""
    rows, columns = target_size(frames[0].height, frames[0].width, config, fps is not None)
    pixels = []
    for frame in frames:
        frame = frame.convert("RGB")
        if frame.size != (columns, rows):
            frame = frame.resize((columns, rows), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(frame, np.float32) / np.float32(255) - np.float32(config["mean"]))
    video = np.stack(pixels) / np.float32(config["std"])
    depth, patch, merge = config["temporal_patch"], config["patch"], config["merge"]
    video = np.concatenate([video, *[video[-1:]] * (-len(video) % depth)])
    t, h, w = len(video) // depth, rows // patch, columns // patch
    cut = video.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    patches = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    return Medium(patches, (t, h, w), None if fps is None else depth / fps)


def build(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[tuple[Sequence[Medium], str]], config: Mapping[str, Any]
) -> Inputs:
    """A batch of prompts, each its media followed by its text, padded to ``config["length"]``.

    Special tokens that a text spells are plain text. Raises UserError for media that are too long.
    """
    merge, chat = config["media"]["merge"], config.get("template", CHAT)
    rows, media = [], []
    for number, (own, text) in enumerate(prompts):
        blocks = [(m, chat["image" if m.seconds is None else "video"], math.prod(m.grid) // merge**2) for m in own]
        shown = [f"{chat['vision_start']}{pad * count}{chat['vision_end']}" for _, pad, count in blocks]
        ids = turn(tokenizer, list(zip(labels(own, config), shown, strict=True)), text, config)
        ids, at = np.asarray(ids), 0
        starts = []
        for medium, pad, count in blocks:
            at += int(np.argmax(ids[at:] == tokenizer.convert_tokens_to_ids(pad)))
            starts.append((at, medium))
            at += count
        rows.append((ids, positions(len(ids), starts, config)))
        for start, medium in starts:
            columns = torch.arange(start, start + math.prod(medium.grid) // merge**2)
            places = (torch.full_like(columns, number), columns)
            media.append((torch.from_numpy(medium.patches), torch.tensor([medium.grid]), places))
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
    """Tokens of a prompt of media, each a label and its placeholders, and text.

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
        for label, shown in media:
            ids += [*encode(f"{run}{label}", split_special_tokens=True).input_ids, *encode(shown).input_ids]
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


def positions(length: int, media: Sequence[tuple[int, Medium]], config: Mapping[str, Any]) -> np.ndarray:
    """Positions ``[3 n]`` (time, height, width): text counts up; what follows a medium starts one after its largest."""
    out, start, at = np.zeros((3, length), np.int64), 0, 0
    for place, medium in media:
        out[:, at:place] = np.arange(start, start + place - at)
        start += place - at
        t, h, w = medium.grid[0], *(side // config["media"]["merge"] for side in medium.grid[1:])
        step = 1.0 if medium.seconds is None else config["tokens_per_second"] * medium.seconds
        time = np.floor(np.arange(t, dtype=np.float32) * np.float32(step)).astype(np.int64)
        block = np.stack(np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)
        at = place + block.shape[1]
        out[:, place:at] = start + block
        start += int(block.max()) + 1
    out[:, at:] = np.arange(start, start + length - at)
    return out
