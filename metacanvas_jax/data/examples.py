"""From a captioned picture to the arrays a training step reads: one class per objective, called once per sample.

The batches they make are described in ``train/objectives.py``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.dataset import scene_of
from metacanvas_jax.data.questions import Exchange, picture_exchanges, plan, text_exchanges
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.scenes import SceneWorld
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import read_image
from metacanvas_jax.mllm.prompt import END, Prompter
from metacanvas_jax.types import Media

Example = dict[str, np.ndarray]
Batch = dict[str, Any]


class PaintExamples:
    """A picture and its prompt, padded to ``length`` tokens."""

    def __init__(self, prompter: Prompter, length: int):
        self.prompter, self.length = prompter, length
        self._text = functools.lru_cache(maxsize=65536)(self._encode)

    def _encode(self, prompt: str) -> Example:
        inputs = self.prompter.batch([self.prompter(prompt)], length=self.length)
        return {"tokens": inputs.tokens[0], "positions": inputs.positions[:, 0], "mask": inputs.mask[0]}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        """``pixels`` [1 h w 3] uint8 and the MLLM's inputs. Raises UserError for a prompt that is too long."""
        del rng
        return {"pixels": sample.target[:1], **self._text(sample.prompt)}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of examples. Raises ValueError when the pictures differ in size."""
        return stacked(examples)


class UnderstandExamples:
    """A question about a scene and its answer, in ``length`` tokens.

    ``picture_share`` of the questions are about the picture, the others about the prompt alone; ``plan_share`` of those
    ask for everything that the prompt wants drawn, which is the one answer that needs all of it. ``prompter`` opens the
    assistant's turn; the answer and the end of the turn follow it. The words of the answer weigh 1, those before it
    ``context_weight``: reading a prompt word by word is worth learning too.
    """

    def __init__(
        self,
        prompter: Prompter,
        world: SceneWorld,
        length: int,
        *,
        picture_share: float = 0.3,
        plan_share: float = 0.5,
        context_weight: float = 0.1,
    ):
        if not prompter.config.assistant:
            raise ValueError("questions are answered in the assistant's turn: the prompter must open it")
        self.prompter, self.world, self.length = prompter, world, length
        self.picture_share, self.plan_share, self.context_weight = picture_share, plan_share, context_weight
        self.grid = read_image(np.full((world.size, world.size, 3), 255, np.uint8), prompter.config.media).grid

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        """One exchange drawn at random; ``patches`` and ``slots`` are those of the picture, if it is about it.

        An exchange that is too long is passed over; raises UserError when none of the scene's is short enough.
        """
        scene = scene_of(sample)
        about_picture = rng.random() < self.picture_share
        if about_picture:
            exchanges = picture_exchanges(rng, self.world, scene)
        else:
            exchanges = text_exchanges(rng, self.world, scene.request, scene.prompt)
        order = [exchanges[i] for i in rng.permutation(len(exchanges))]
        if not about_picture and rng.random() < self.plan_share:
            order.sort(key=lambda exchange: exchange.answer != plan(scene.request))
        for exchange in order[:-1]:
            if self.fits(exchange, about_picture):
                return self.encode(exchange, sample.image if about_picture else None)
        return self.encode(order[-1], sample.image if about_picture else None)

    def fits(self, exchange: Exchange, about_picture: bool) -> bool:
        """Whether an exchange has at most ``length`` tokens."""
        question = len(self.prompter(exchange.question).tokens)
        image = 2 + int(np.prod(self.grid)) // self.prompter.config.media.merge**2 if about_picture else 0
        return question + image + len(self.prompter.text(exchange.answer)) + 1 <= self.length

    def encode(self, exchange: Exchange, image: UInt8[np.ndarray, "h w 3"] | None) -> Example:
        """The arrays of one exchange. Raises UserError when it is longer than ``length``."""
        parts: list[Any] = [exchange.question]
        if image is not None:
            parts.insert(0, read_image(image, self.prompter.config.media))
        prompt = self.prompter(parts)
        answer = self.prompter.text(exchange.answer)
        tokens = np.concatenate([prompt.tokens, answer, [self.prompter.ids[END]]]).astype(np.int32)
        if len(tokens) > self.length:
            raise UserError(f"the exchange {exchange} has {len(tokens)} tokens, more than {self.length}")
        after = prompt.positions.max() + 1 + np.arange(len(answer) + 1, dtype=np.int32)
        positions = np.concatenate([prompt.positions, np.broadcast_to(after, (3, len(after)))], axis=1)
        real, question = len(tokens), len(prompt.tokens)
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
        example["tokens"][:real] = tokens
        example["positions"][:, :real] = positions
        example["weights"][:question] = self.context_weight
        example["weights"][question:real] = 1.0
        for patches, start in prompt.media:
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
