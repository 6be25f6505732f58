"""From the output of a processor of transformers to the inputs of the MLLM here."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import Patches
from metacanvas_jax.mllm.positions import sequence_positions
from metacanvas_jax.mllm.prompt import IMAGE, VIDEO, Layout, Prompt, Prompter
from metacanvas_jax.types import MllmInputs


def processed_inputs(
    processed: Mapping[str, Any], prompter: Prompter, *, length: int | None = None, layout: Layout | None = None
) -> MllmInputs:
    """A batch of what a processor returned, padded by ``Prompter.batch``, which takes ``length`` and ``layout``.

    Raises UserError as ``processed_prompts`` and ``Prompter.batch`` do.
    """
    return prompter.batch(processed_prompts(processed, prompter), length=length, layout=layout)


def processed_prompts(processed: Mapping[str, Any], prompter: Prompter) -> list[Prompt]:
    """The prompts in the output of a processor, without its padding.

    ``processed`` holds ``input_ids`` and, where they exist, ``attention_mask``, ``pixel_values`` with
    ``image_grid_thw``, and ``pixel_values_videos`` with ``video_grid_thw`` and ``second_per_grid_ts`` (1 second
    unless given): lists, numpy arrays or tensors on the CPU. The tokens are kept as they are. Positions follow the rule
    of the prompter, which finds the placeholder tokens of media by name.

    Raises UserError for placeholders and media that do not belong together.
    """
    rows = np.atleast_2d(np.asarray(processed["input_ids"]))
    masks = np.asarray(processed.get("attention_mask", np.ones_like(rows)), bool).reshape(rows.shape)
    media = {
        prompter.ids[IMAGE]: _media(processed, "pixel_values", "image_grid_thw", prompter),
        prompter.ids[VIDEO]: _media(processed, "pixel_values_videos", "video_grid_thw", prompter),
    }
    prompts = [_prompt(row[mask].astype(np.int32), media, prompter) for row, mask in zip(rows, masks, strict=True)]
    for kind, left in media.items():
        if count := len(list(left)):
            raise UserError(f"{count} media have no placeholder {_name(kind, prompter)} in the prompts")
    return prompts


def _media(processed: Mapping[str, Any], values: str, grids: str, prompter: Prompter) -> Iterator[Patches]:
    """The images or the videos of a batch, in the order of their placeholders."""
    if processed.get(values) is None:
        return
    patches = np.asarray(processed[values], np.float32)
    shapes = [(int(t), int(h), int(w)) for t, h, w in np.asarray(processed[grids])]
    wanted = (sum(int(np.prod(shape)) for shape in shapes), prompter.config.media.values)
    if patches.shape != wanted:
        raise UserError(f"{values} is {list(patches.shape)}, expected {list(wanted)} for the grids in {grids}")
    seconds: list[float | None] = [None] * len(shapes)
    if grids == "video_grid_thw":
        given = processed.get("second_per_grid_ts")
        seconds = [1.0] * len(shapes) if given is None else [float(each) for each in given]
        if len(seconds) != len(shapes):
            raise UserError(f"second_per_grid_ts holds {len(seconds)} numbers for {len(shapes)} videos")
    at = 0
    for shape, each in zip(shapes, seconds, strict=True):
        count = int(np.prod(shape))
        yield Patches(patches[at : at + count], shape, each)
        at += count


def _prompt(tokens: Int[np.ndarray, " l"], media: Mapping[int, Iterator[Patches]], prompter: Prompter) -> Prompt:
    parts, found, at = [], [], 0
    seen = np.isin(tokens, list(media))
    while seen[at:].any():
        kind = int(tokens[at + np.argmax(seen[at:])])
        patches, places = next(media[kind], None), []
        if patches is None:
            raise UserError(f"the prompts have more placeholders {_name(kind, prompter)} than there are media")
        for block in prompter.blocks(patches):
            following, count = np.flatnonzero(tokens[at:] == kind), int(np.prod(block.grid))
            start = at + int(following[0]) if len(following) else at
            if (tokens[start : start + count] == kind).sum() < count:
                raise UserError(f"a medium of grid {patches.grid} needs {count} placeholders {_name(kind, prompter)}")
            parts += [start - at, block]
            places.append(np.arange(start, start + count))
            at = start + count
        found.append((patches, np.concatenate(places)))
    positions = sequence_positions([*parts, len(tokens) - at], prompter.config.rule)
    return Prompt(tokens, positions, tuple(found))


def _name(kind: int, prompter: Prompter) -> str:
    return next(token for token, number in prompter.ids.items() if number == kind)
