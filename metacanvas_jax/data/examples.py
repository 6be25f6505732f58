"""From a sample to the arrays a training step reads: one class per objective, called once per sample.

The batches they make are described in ``train/objectives.py``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerBase

from metacanvas_jax.data.formats.records import scene_of
from metacanvas_jax.data.samples import LATENTS, Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl.media import (
    MediaConfig,
    Patches,
    read_image,
    read_video,
    sample_frames,
    target_size,
)
from metacanvas_jax.mllm.qwen2_5_vl.prompt import END, Layout, Prompt, Prompter
from metacanvas_jax.tasks import RECONSTRUCT, TASKS, Bucket, TaskName
from metacanvas_jax.text.gemma2.network import INSTRUCTION, sana_tokens
from metacanvas_jax.types import Media
from metacanvas_jax.worlds.questions import Exchange, follow_up, picture_exchanges, plan, text_exchanges
from metacanvas_jax.worlds.scenes import SceneWorld, sample_words

Example = dict[str, np.ndarray]
Batch = dict[str, Any]


class TextRows:
    """Prompts for the text encoder that a DiT keeps for itself.

    ``length`` is the number of states the DiT reads. The empty prompt goes without ``instruction``, as in SANA's
    pipeline, padded to the same length. A tokenizer without a token for the beginning of a sequence gets its padding
    there. With ``reads_prompt`` False every prompt is empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        instruction: str = INSTRUCTION,
        reads_prompt: bool = True,
    ):
        self._tokenizer, self._length, self._reads_prompt = tokenizer, length, reads_prompt
        self._pad = tokenizer.pad_token_id or 0
        self._instruction = instruction if reads_prompt else ""
        self._row = functools.lru_cache(maxsize=65536)(self._make)

    def __call__(self, prompt: str) -> Example:
        """``text_tokens`` and ``text_mask`` [n]."""
        return dict(self._row(prompt if self._reads_prompt else ""))

    def _make(self, prompt: str) -> Example:
        tokens, mask = self._rows(prompt, self._instruction)
        if not prompt.strip() and self._instruction:
            missing = ((0, 0), (0, tokens.shape[1] - self._length))
            tokens, mask = self._rows("", "")
            tokens, mask = np.pad(tokens, missing, constant_values=self._pad), np.pad(mask, missing)
        return {"text_tokens": tokens[0], "text_mask": mask[0]}

    def _rows(self, prompt: str, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        return sana_tokens(self._encode, [prompt], instruction=instruction, length=self._length, pad=self._pad)

    def _encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text)) if text else []
        if self._tokenizer.bos_token_id is None:
            return [self._pad, *ids]
        return ids or [self._tokenizer.bos_token_id]


class PaintExamples:
    """Samples of one bucket: pixels for the autoencoder, and the prompt with its media for the MLLM.

    ``prompter`` None leaves the MLLM one token of nothing; ``text`` is the DiT's own text encoder. A prompt that is too
    long for the bucket loses its last words. ``latents`` is the shape [t h w c] of a target's where samples bring their
    latents, which then take the place of pixels; None where they are to be encoded.
    """

    def __init__(
        self,
        prompter: Prompter | None,
        bucket: Bucket,
        *,
        text: TextRows | None = None,
        video_fps: float = 2.0,
        latents: tuple[int, int, int, int] | None = None,
    ):
        self.prompter, self.bucket, self.text, self.video_fps, self.latents = prompter, bucket, text, video_fps, latents
        self.task = TASKS[bucket.task]
        self.layout: Layout = () if prompter is None else media_layout(bucket, prompter.config.media, video_fps)
        self._written = functools.lru_cache(maxsize=65536)(self._write)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        """The arrays of one sample, as ``train/objectives.py`` lists them; media still as ``patches`` and ``slots``.

        Raises UserError for a sample that has not the bucket's shape, or whose media alone are too long.
        """
        del rng
        sample = self.fitted(sample)
        if self.latents is not None:
            return self.stored(sample, self.latents) | self.read(sample)
        example = {"pixels": sample.target}
        if self.task.vae == "source":
            example["source"] = sample.source
        if self.task.vae == "references":
            example["references"] = np.stack(sample.references)
        return example | self.read(sample)

    def stored(self, sample: Sample, shape: tuple[int, int, int, int]) -> Example:
        """The latents that a sample brings. Raises UserError for one that is missing or of another shape."""
        wanted = {"pixels": shape}
        if self.task.vae == "source":
            wanted["source"] = shape
        if self.task.vae == "references":
            wanted["references"] = (self.bucket.references, *shape[1:])
        example = {}
        for part, expected in wanted.items():
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
        """The sample as the task wants it: references repeated to their number, the prompt of a reconstruction."""
        if self.bucket.task == "reconstruction":
            sample = dataclasses.replace(sample, prompt=RECONSTRUCT)
        wanted = {"target": (sample.target, self.bucket.frames if self.latents is None else 1)}
        if self.task.vae == "source":
            wanted["source"] = (sample.source, self.bucket.frames)
        if self.task.vae == "references":
            if not sample.references:
                raise UserError(f"{sample.name or sample.prompt!r} has no references, which {self.bucket.task} needs")
            chosen = itertools.islice(itertools.cycle(sample.references), self.bucket.references)
            sample = dataclasses.replace(sample, references=tuple(chosen))
            wanted["references"] = (np.stack(sample.references), self.bucket.references)
        for part, (pixels, frames) in wanted.items():
            expected = (frames, *self.bucket.size, 3)
            if pixels is None or pixels.shape != expected:
                found = "missing" if pixels is None else f"{list(pixels.shape)}"
                raise UserError(f"{sample.name or sample.prompt!r}: the {part} is {found}, expected {list(expected)}")
        return sample

    def read(self, sample: Sample) -> Example:
        """What the MLLM and the DiT's own text encoder read of a fitted sample."""
        prompt = sample.prompt
        example = self._write(prompt, self.media(sample)) if self.layout else dict(self._written(prompt))
        return example if self.text is None else example | self.text(sample.prompt)

    def media(self, sample: Sample) -> list[Patches]:
        """What stands before the prompt: images, or one video of a few frames a second."""
        assert self.prompter is not None
        config, medium = self.prompter.config.media, self.task.mllm
        if medium == "references":
            return [read_image(image, config) for image in sample.references]
        frames = sample.source if medium == "source" else sample.target
        assert frames is not None
        if medium == "first frame" or len(frames) == 1:
            return [read_image(frames[0], config)]
        chosen, fps = sample_frames(len(frames), self.bucket.fps, target=self.video_fps)
        return [read_video(list(frames[chosen]), fps, config)]

    def _write(self, prompt: str, media: Sequence[Patches] = ()) -> Example:
        if self.prompter is None:
            return {"tokens": np.zeros(1, np.int32), "positions": np.zeros((3, 1), np.int32), "mask": np.ones(1, bool)}
        inputs = self.prompter.batch(
            [shortened(self.prompter, media, prompt, self.bucket.length)], length=self.bucket.length, layout=self.layout
        )
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


def media_layout(bucket: Bucket, config: MediaConfig, video_fps: float) -> Layout:
    """The media that stand in every prompt of a bucket: their grid in patches, and how many there are."""
    medium, (height, width) = TASKS[bucket.task].mllm, bucket.size
    if medium == "nothing":
        return ()
    video = medium in ("source", "target") and bucket.frames > 1
    rows, columns = target_size(height, width, config, video=video)
    frames = len(sample_frames(bucket.frames, bucket.fps, target=video_fps)[0]) if video else 1
    grid = (-(-frames // config.temporal_patch), rows // config.patch, columns // config.patch)
    return ((grid, bucket.references if medium == "references" else 1),)


def shortened(prompter: Prompter, media: Sequence[Patches], text: str, length: int) -> Prompt:
    """A prompt of at most ``length`` tokens, without the last words of the text where it is too long.

    Raises UserError when the media alone are too long.
    """
    prompt = prompter([*media, text])
    while len(prompt.tokens) > length and text:
        tokens = prompter.text(text)
        text = prompter.decode(tokens[: max(0, len(tokens) - (len(prompt.tokens) - length))])
        prompt = prompter([*media, text])
    if len(prompt.tokens) > length:
        raise UserError(f"the media of a prompt need {len(prompt.tokens)} tokens, the bucket has {length}")
    return prompt


class UnderstandExamples:
    """Questions about a scene and their answers, one turn after the other, in ``length`` tokens.

    ``picture_share`` of the conversations are about the picture, the others about the prompt alone; ``plan_share`` of
    those begin with everything that the prompt wants drawn, which is the one answer that needs all of it. ``prompter``
    opens the assistant's turn; the answer and the end of the turn follow it. The words of answers weigh 1, all others
    ``context_weight``. By default that is 0: a model that learns to foretell prompts learns which combinations are
    never asked for, and its hidden states then make those look impossible. For the same reason prompts are of any
    combination, as a large model has read of everything; pictures are of the trained ones alone.
    """

    def __init__(
        self,
        prompter: Prompter,
        world: SceneWorld,
        length: int,
        *,
        picture_share: float = 0.25,
        plan_share: float = 0.8,
        context_weight: float = 0.0,
    ):
        if not prompter.config.assistant:
            raise ValueError("questions are answered in the assistant's turn: the prompter must open it")
        self.prompter, self.world, self.length = prompter, world, length
        self.picture_share, self.plan_share, self.context_weight = picture_share, plan_share, context_weight
        self.grid = read_image(np.full((world.size, world.size, 3), 255, np.uint8), prompter.config.media).grid
        # Follow-up questions and answers are few and come again; tokenizing them anew would take most of the time.
        self._turn = functools.lru_cache(maxsize=65536)(prompter)
        self._answer = functools.lru_cache(maxsize=65536)(prompter.text)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        """As many exchanges as fit, drawn at random; ``patches`` and ``slots`` are those of the picture, if about it.

        An exchange that is too long is passed over; raises UserError when none of the scene's is short enough.
        """
        about_picture = rng.random() < self.picture_share
        if about_picture:
            exchanges, everything = picture_exchanges(rng, self.world, scene_of(sample)), None
        else:
            request, prompt = sample_words(rng, self.world)
            exchanges, everything = text_exchanges(rng, self.world, request, prompt), plan(request)
        order = [exchanges[i] for i in rng.permutation(len(exchanges))]
        if not about_picture and rng.random() < self.plan_share:
            order.sort(key=lambda exchange: exchange.answer != everything)
        chosen, used = [], 0
        for exchange in order:
            cost = self.cost(exchange, about_picture, follows=bool(chosen))
            if used + cost <= self.length:
                chosen.append(exchange)
                used += cost
        return self.encode(chosen or order[:1], sample.image if about_picture else None)

    def cost(self, exchange: Exchange, about_picture: bool, follows: bool = False) -> int:
        """Tokens of an exchange, where it opens the conversation or follows others."""
        question = len(self._turn(follow_up(exchange.question) if follows else exchange.question).tokens)
        image = 2 + int(np.prod(self.grid)) // self.prompter.config.media.merge**2 if about_picture else 0
        return question + (len(self._between) if follows else image) + len(self._answer(exchange.answer)) + 1

    def fits(self, exchange: Exchange, about_picture: bool) -> bool:
        """Whether an exchange alone has at most ``length`` tokens."""
        return self.cost(exchange, about_picture) <= self.length

    @functools.cached_property
    def _between(self) -> np.ndarray:
        return self.prompter.text("\n")

    def encode(self, exchanges: Sequence[Exchange], image: UInt8[np.ndarray, "h w 3"] | None) -> Example:
        """The arrays of a conversation. Raises UserError when it is longer than ``length``."""
        question = exchanges[0].question
        if image is None:
            opening = self._turn(question)
        else:
            opening = self.prompter([read_image(image, self.prompter.config.media), question])
        tokens, positions, answers = [opening.tokens], [opening.positions], []
        for number, exchange in enumerate(exchanges):
            following = self._answer(exchange.answer), [self.prompter.ids[END]]
            if number:
                turn = self._between, self._turn(follow_up(exchange.question)).tokens
                following = *turn, *following
            start = sum(map(len, tokens)) + sum(map(len, following[:-2]))
            answers.append(slice(start, start + len(following[-2]) + 1))
            tokens += following
        flat = np.concatenate(tokens).astype(np.int32)
        if len(flat) > self.length:
            raise UserError(f"the exchanges {exchanges} have {len(flat)} tokens, more than {self.length}")
        opened = len(opening.tokens)
        after = opening.positions.max() + 1 + np.arange(len(flat) - opened, dtype=np.int32)
        positions.append(np.broadcast_to(after, (3, len(after))))
        real = len(flat)
        example = {
            "tokens": np.full(self.length, self.prompter.ids["<|endoftext|>"], np.int32),
            "positions": np.zeros((3, self.length), np.int32),
            "mask": np.arange(self.length) < real,
            "weights": np.zeros(self.length, np.float32),
            "patches": np.zeros((1, int(np.prod(self.grid)), self.prompter.config.media.values), np.float32),
            "slots": np.full(
                (1, int(np.prod(self.grid)) // self.prompter.config.media.merge**2), self.length, np.int32
            ),
        }
        example["tokens"][:real] = flat
        example["positions"][:, :real] = np.concatenate(positions, axis=1)
        example["weights"][:real] = self.context_weight
        for answer in answers:
            example["weights"][answer] = 1.0
        for patches, start in opening.media:
            merged = example["slots"].shape[1]
            example["patches"][0] = patches.values
            example["slots"][0] = start + np.arange(merged)
            example["weights"][start : start + merged] = 0.0
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of examples, with the pictures as ``Media``."""
        batch = stacked(examples)
        return batch | {"media": (Media(batch.pop("patches"), batch.pop("slots"), self.grid),)}


def stacked(examples: Sequence[Example]) -> Batch:
    """Arrays of the same name, one per example, along a new first axis."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
