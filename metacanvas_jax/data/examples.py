"""From samples to the arrays that the networks read: the one way there for training, drawing and precomputation.

Everything that is read goes by these rules:

- a prompt that is too long for its bucket loses its last words, and a warning says so; media are never cut;
- the empty prompt of guidance is the sample without its words; its media stay;
- the frames of a video that the MLLM reads follow from the bucket's frame rate, so that all samples have one shape.

``train/objectives.py`` lists the arrays of a batch.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from metacanvas_jax.data.samples import LATENTS, SOURCE_FRAMES, Sample
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import (
    MediaConfig,
    Patches,
    read_image,
    read_video,
    sample_frames,
    target_size,
)
from metacanvas_jax.mllm.prompt import Layout, Prompt, Prompter
from metacanvas_jax.tasks import TASKS, Bucket, TaskName
from metacanvas_jax.text.prompts import INSTRUCTION, prompt_tokens
from metacanvas_jax.types import Media

logger = logging.getLogger(__name__)

Example = dict[str, np.ndarray]
Batch = dict[str, Any]


class TextRows:
    """Prompts as input of the text encoder that a DiT keeps for itself.

    ``length`` is the number of states that the DiT reads. ``instruction`` stands in front of every prompt but the empty
    one of training and of guidance, which is padded to the same length. An empty prompt that is ``asked`` for has it
    too, as in the published pipelines. Every sequence begins with the tokenizer's token for its beginning, or with its
    padding token where it has none. With ``reads_prompt`` False every prompt is replaced by the empty one. ``worded``
    makes tokens and mask of every prompt alike, in place of all this.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        instruction: str = INSTRUCTION,
        reads_prompt: bool = True,
        worded: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self._worded = worded
        self._tokenizer, self._length, self._reads_prompt = tokenizer, length, reads_prompt
        self._pad = tokenizer.pad_token_id or 0
        self._instruction = instruction if reads_prompt else ""
        self._row = functools.lru_cache(maxsize=65536)(self._make)

    def __call__(self, prompt: str, *, asked: bool = False) -> Example:
        """``text_tokens`` and ``text_mask`` [n]."""
        return dict(self._row(prompt if self._reads_prompt else "", asked))

    def _make(self, prompt: str, asked: bool) -> Example:
        if self._worded is not None:
            tokens, mask = self._worded(prompt)
            return {"text_tokens": tokens, "text_mask": mask}
        tokens, mask = self._rows(prompt, self._instruction)
        if not (asked or prompt.strip()) and self._instruction:
            missing = ((0, 0), (0, tokens.shape[1] - self._length))
            tokens, mask = self._rows("", "")
            tokens, mask = np.pad(tokens, missing, constant_values=self._pad), np.pad(mask, missing)
        return {"text_tokens": tokens[0], "text_mask": mask[0]}

    def _rows(self, prompt: str, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        return prompt_tokens(self._encode, [prompt], instruction=instruction, length=self._length, pad=self._pad)

    def _encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text)) if text else []
        if self._tokenizer.bos_token_id is None:
            return [self._pad, *ids]
        return ids or [self._tokenizer.bos_token_id]


class PaintExamples:
    """Samples of one bucket as network inputs: pixels for the autoencoder, the prompt and its media for the MLLM.

    ``prompter`` None stands for a model without MLLM: its input is then one token that nothing reads. ``text`` makes
    the input of the DiT's own text encoder. ``latents`` is the shape [t h w c] of a target's latents where samples
    bring them (they then replace pixels), None where pixels are encoded. ``target`` False is for drawing: of the target
    only a first frame that the task gives is kept.
    """

    def __init__(
        self,
        prompter: Prompter | None,
        bucket: Bucket,
        *,
        text: TextRows | None = None,
        video_fps: float = 2.0,
        latents: tuple[int, int, int, int] | None = None,
        target: bool = True,
    ):
        self.prompter, self.bucket, self.text, self.video_fps, self.latents = prompter, bucket, text, video_fps, latents
        self.target, self.task = target, TASKS[bucket.task]
        self.layout: Layout = () if prompter is None else media_layout(bucket, prompter.config.media, video_fps)
        self._written = functools.lru_cache(maxsize=65536)(self._write)
        self._warned = False

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None, *, asked: bool = False) -> Example:
        """The arrays of one sample; media are still ``patches`` and ``slots``. ``rng`` is not used.

        ``asked`` says that the prompt is a user's (see ``TextRows``).

        Raises UserError for a sample that has not the bucket's shape, or whose media alone are too long.
        """
        del rng
        sample = self.fitted(sample)
        seen = self.pixels(sample) if self.latents is None else self.stored(sample, self.latents)
        return seen | self.read(sample, asked=asked)

    def batch(self, samples: Sequence[Sample], *, words: bool = True) -> Batch:
        """Some samples as one batch; ``words`` False gives them the empty prompt."""
        if not words:
            samples = [dataclasses.replace(sample, prompt="") for sample in samples]
        return self.collate([self(sample, asked=words and not self.target) for sample in samples])

    def pixels(self, sample: Sample) -> Example:
        """What the autoencoder reads of a fitted sample."""
        example = {}
        if self.target or self.task.vae == "first frame":
            example["pixels"] = sample.target if self.target else sample.target[:1]
        if self.task.vae == "source" and SOURCE_FRAMES in sample.arrays:
            example[LATENTS["source"]] = sample.arrays[LATENTS["source"]]
        elif self.task.vae == "source":
            example["source"] = sample.source
        if self.task.vae == "references":
            example["references"] = np.stack(sample.references)
        return example

    def stored(self, sample: Sample, shape: tuple[int, int, int, int]) -> Example:
        """The latents that a sample brings. Raises UserError for one that is missing or of another shape."""
        parts = {"pixels": shape}
        if self.task.vae == "source":
            parts["source"] = shape
        if self.task.vae == "references":
            parts["references"] = (self.bucket.references, *shape[1:])
        example = {}
        for part, expected in parts.items():
            name = LATENTS[part]
            latents = sample.arrays.get(name)
            if latents is not None and part == "references":  # repeated or left out as the pictures are
                latents = latents[np.arange(self.bucket.references) % len(latents)]
            if latents is None or latents.shape != expected:
                found = "missing" if latents is None else f"{list(latents.shape)}"
                raise UserError(f"{sample.name or sample.prompt!r}: {name} is {found}, expected {list(expected)}")
            example[name] = latents
        return example

    def fitted(self, sample: Sample) -> Sample:
        """The sample with as many references as the bucket has: they are repeated, or the last ones left out.

        Raises UserError for a part that is missing or has another shape than the bucket. A drawing takes targets of any
        length.
        """
        whole = self.bucket.frames if self.latents is None else 1
        parts = {"target": (sample.target, whole if self.target else len(sample.target))}
        if self.task.vae == "source":
            kept = sample.arrays.get(SOURCE_FRAMES)
            parts["source"] = (sample.source, self.bucket.frames if kept is None else len(kept))
        if self.task.vae == "references":
            if not sample.references:
                raise UserError(f"{sample.name or sample.prompt!r} has no references, which {self.bucket.task} needs")
            chosen = itertools.islice(itertools.cycle(sample.references), self.bucket.references)
            sample = dataclasses.replace(sample, references=tuple(chosen))
            parts["references"] = (np.stack(sample.references), self.bucket.references)
        for part, (pixels, frames) in parts.items():
            expected = (frames, *self.bucket.size, 3)
            if pixels is None or pixels.shape != expected:
                found = "missing" if pixels is None else f"{list(pixels.shape)}"
                raise UserError(f"{sample.name or sample.prompt!r}: the {part} is {found}, expected {list(expected)}")
        return sample

    def read(self, sample: Sample, *, asked: bool = False) -> Example:
        """What the MLLM and the DiT's own text encoder read of a fitted sample."""
        prompt = sample.prompt
        example = self._write(prompt, self.media(sample)) if self.layout else dict(self._written(prompt))
        return example if self.text is None else example | self.text(sample.prompt, asked=asked)

    def media(self, sample: Sample) -> list[Patches]:
        """The media before the prompt: images, or one video of which ``video_fps`` frames a second are read."""
        assert self.prompter is not None
        config, medium = self.prompter.config.media, self.task.mllm
        if medium == "references":
            return [read_image(image, config) for image in sample.references]
        frames = sample.source if medium == "source" else sample.target
        assert frames is not None
        if medium == "first frame" or self.bucket.frames == 1:
            return [read_image(frames[0], config)]
        chosen, fps = sample_frames(self.bucket.frames, self.bucket.fps, target=self.video_fps)
        kept = sample.arrays.get(SOURCE_FRAMES) if medium == "source" else None
        if kept is None:
            frames = frames[chosen]
        elif not np.array_equal(kept, chosen):
            raise UserError(f"{sample.name or sample.prompt!r}: {other_frames(kept, chosen)}")
        return [read_video(list(frames), fps, config)]

    def needed(self, prompt: str) -> int:
        """Tokens of a prompt with the media of this bucket's samples, before anything is cut; 1 without an MLLM."""
        return 1 if self.prompter is None else len(self.prompter([*self._blank, prompt]).tokens)

    @functools.cached_property
    def _blank(self) -> list[Patches]:
        """Media of the bucket's shape. How many tokens media take depends on their shape alone."""
        video = np.zeros((self.bucket.frames, *self.bucket.size, 3), np.uint8)
        references = (video[0],) * self.bucket.references
        return self.media(Sample("", video, source=video, references=references)) if self.layout else []

    def _write(self, prompt: str, media: Sequence[Patches] = ()) -> Example:
        if self.prompter is None:
            return {"tokens": np.zeros(1, np.int32), "positions": np.zeros((3, 1), np.int32), "mask": np.ones(1, bool)}
        length = self.bucket.length
        whole = self.prompter([*media, prompt])
        read = shortened(self.prompter, whole, media, prompt, length)
        if read is not whole and not self._warned:
            self._warned = True
            logger.warning(
                "%s: a prompt of %d tokens loses its last words, the bucket's length is %d (said once)",
                *(self.bucket.task, len(whole.tokens), length),
            )
        inputs = self.prompter.batch([read], length=length, layout=self.layout)
        example = {"tokens": inputs.tokens[0], "positions": inputs.positions[:, 0], "mask": inputs.mask[0]}
        for group in inputs.media:
            example |= {"patches": group.patches[0], "slots": group.slots[0]}
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of examples, with their media and the name of their task."""
        batch = stacked(examples)
        if self.layout:
            batch["media"] = (Media(batch.pop("patches"), batch.pop("slots"), self.layout[0][0]),)
        return batch | {"task": TaskName(self.bucket.task)}


def other_frames(kept: Sequence[int] | np.ndarray, read: Sequence[int] | np.ndarray) -> str:
    """What is wrong with a source of which other frames are stored than a run's MLLM reads."""
    there, here = (", ".join(map(str, frames)) for frames in (kept, read))
    return (
        f"of the source only frames {there} are stored, and this run's MLLM reads {here}; prepare it with this config"
    )


def frames_of_source(clip: Clip, video_fps: float) -> list[int]:
    """The frames of a video edit's source that the MLLM reads; all of them where the clip has no stated rate."""
    frames = clip.frames or 1
    return sample_frames(frames, clip.fps, target=video_fps)[0].tolist() if clip.fps else list(range(frames))


def media_layout(bucket: Bucket, config: MediaConfig, video_fps: float) -> Layout:
    """The media in every prompt of a bucket: their grid in patches, and how many there are."""
    medium, (height, width) = TASKS[bucket.task].mllm, bucket.size
    if medium == "nothing":
        return ()
    video = medium in ("source", "target") and bucket.frames > 1
    frames = len(sample_frames(bucket.frames, bucket.fps, target=video_fps)[0]) if video else 1
    rows, columns = target_size(height, width, config, frames=frames if video else None)
    grid = (-(-frames // config.temporal_patch), rows // config.patch, columns // config.patch)
    return ((grid, bucket.references if medium == "references" else 1),)


def shortened(prompter: Prompter, prompt: Prompt, media: Sequence[Patches], text: str, length: int) -> Prompt:
    """``prompt``, made of media and text, with at most ``length`` tokens: where it is longer, the last words go.

    Raises UserError when the media alone are too long.
    """
    while len(prompt.tokens) > length and text:
        tokens = prompter.text(text)
        text = prompter.cut(text, len(tokens) - (len(prompt.tokens) - length))
        prompt = prompter([*media, text])
    if len(prompt.tokens) > length:
        raise UserError(f"the media of a prompt need {len(prompt.tokens)} tokens, the bucket has {length}")
    return prompt


def stacked(examples: Sequence[Example]) -> Batch:
    """Arrays of the same name, one per example, along a new first axis."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
