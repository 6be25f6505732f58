"""What teaches a small MLLM, as network inputs: questions about a scene with their answers, and sheets of facts."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.examples import Batch, Example, stacked
from metacanvas_jax.data.formats.records import scene_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import read_image
from metacanvas_jax.mllm.positions import MediaBlock, block_positions
from metacanvas_jax.mllm.prompt import END, Prompter
from metacanvas_jax.mllm.template import CHAT
from metacanvas_jax.types import Media
from metacanvas_jax.worlds.facts import Facts
from metacanvas_jax.worlds.questions import (
    Exchange,
    cell_names,
    follow_up,
    picture_exchanges,
    text_exchanges,
    things_to_draw,
)
from metacanvas_jax.worlds.requests import Request
from metacanvas_jax.worlds.scenes import SceneWorld, sample_words


class UnderstandExamples:
    """Questions about a scene and their answers, one turn after the other, in ``length`` tokens; or a sheet.

    A share ``picture_share`` of the conversations is about the picture, the others are about the prompt alone. Of the
    latter, a share ``sheet_share`` are sheets, and of the rest a share ``plan_share`` begins with the list of
    everything in the prompt: the only answer that needs the whole prompt. A share ``place_share`` of the prompts names
    places, which are learned last; the others are of the world's mixture. ``prompter`` opens the assistant's turn; the
    answer and the end of the turn follow.

    A *sheet* is a prompt and, where a canvas would stand after it, the names of all cells. In a share ``empty_share``
    of them the prompt is empty. Examples have ``facts`` [l f], what the state of a token should tell
    (``worlds/facts.py``), and ``telling`` [l]: which tokens should. These are the tokens of a prompt, its end, the
    cells of a sheet and, where a picture has one token per cell of the patch grid, the tokens of the picture.

    In the loss, tokens of answers have weight 1 and all others ``context_weight``, by default 0. A model that learns to
    predict prompts also learns which combinations never occur, and its hidden states then represent these badly. For
    the same reason prompts contain any combination, while pictures contain only those of the training split.
    """

    def __init__(
        self,
        prompter: Prompter,
        world: SceneWorld,
        length: int,
        *,
        picture_share: float = 0.4,
        sheet_share: float = 0.5,
        plan_share: float = 0.5,
        place_share: float = 0.3,
        empty_share: float = 0.03,
        context_weight: float = 0.0,
    ):
        if not prompter.config.assistant:
            raise ValueError("questions are answered in the assistant's turn: the prompter must open it")
        self.prompter, self.world, self.length = prompter, world, length
        self.picture_share, self.sheet_share, self.plan_share = picture_share, sheet_share, plan_share
        self.place_share, self.empty_share, self.context_weight = place_share, empty_share, context_weight
        self.facts = Facts(world)
        self.grid = read_image(np.full((world.size, world.size, 3), 255, np.uint8), prompter.config.media).grid
        # There are few different questions and answers; tokenizing them every time would take most of the time.
        self._turn = functools.lru_cache(maxsize=65536)(prompter)
        self._answer = functools.lru_cache(maxsize=65536)(prompter.text)
        self.names = np.concatenate([prompter.text(f" {name}") for name in cell_names(world)])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        """As many random exchanges as fit, as the arrays of one conversation.

        Exchanges that are too long are left out. Raises UserError when all exchanges of the scene are too long.
        """
        about_picture = rng.random() < self.picture_share
        if about_picture:
            scene = scene_of(sample)
            exchanges, everything = picture_exchanges(rng, self.world, scene), None
        else:
            request, prompt = sample_words(rng, self.world, "place" if rng.random() < self.place_share else None)
            if rng.random() < self.sheet_share:
                return self.sheet(*((None, "") if rng.random() < self.empty_share else (request, prompt)))
            exchanges, everything = text_exchanges(rng, self.world, request, prompt), things_to_draw(request)
        order = [exchanges[i] for i in rng.permutation(len(exchanges))]
        if not about_picture and rng.random() < self.plan_share:
            order.sort(key=lambda exchange: exchange.answer != everything)
        chosen, used = [], 0
        for exchange in order:
            cost = self.cost(exchange, about_picture, follows=bool(chosen))
            if used + cost <= self.length:
                chosen.append(exchange)
                used += cost
        example = self.encode(chosen or order[:1], sample.image if about_picture else None)
        if not about_picture:
            self._tell_prompt(example, request, prompt)
        elif example["slots"].shape[1] == len(self.names):
            example["facts"][example["slots"][0]] = self.facts.picture(scene.items)
            example["telling"][example["slots"][0]] = True
        return example

    def sheet(self, request: Request | None, prompt: str) -> Example:
        """The arrays of a prompt and its sheet; ``request`` None is the empty prompt.

        Raises UserError if they are longer than ``length``.
        """
        turn, side = self._turn(prompt), self.facts.columns
        real = len(turn.tokens) - self.prompter.opened
        flat = np.concatenate([turn.tokens[:real], self.names])
        if len(flat) > self.length:
            raise UserError(f"the prompt {prompt!r} and its sheet have {len(flat)} tokens, more than {self.length}")
        positions = np.concatenate([turn.positions[:, :real], block_positions(real, MediaBlock((1, side, side)))], 1)
        example = self._row(flat, positions)
        example["telling"][: len(flat)] = True
        if request is not None:
            self._tell_prompt(example, request, prompt)
            example["facts"][real - 1] = self.facts.everything(request)
            example["facts"][real : len(flat)] = self.facts.cells(request)
        return example

    def _tell_prompt(self, example: Example, request: Request, prompt: str) -> None:
        for end, vector in self.facts.told(request, prompt):
            example["facts"][self._upto(prompt[:end]) - 1] = vector
        example["telling"][: self._upto(prompt)] = True

    def _upto(self, text: str) -> int:
        """Tokens from the beginning of the sequence to the end of ``text``, with which the user's turn begins."""
        return 1 + len(self._answer(CHAT["user"] + text))

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
        example = self._row(flat, np.concatenate(positions, axis=1))
        for answer in answers:
            example["weights"][answer] = 1.0
        for patches, places in opening.media:
            example["patches"][0] = patches.values
            example["slots"][0] = places
            example["weights"][places] = 0.0
        return example

    def _row(self, tokens: np.ndarray, positions: np.ndarray) -> Example:
        """Padded arrays of a sequence without pictures, answers and facts."""
        real, patches = len(tokens), int(np.prod(self.grid))
        media = self.prompter.config.media
        example = {
            "tokens": np.full(self.length, self.prompter.ids["<|endoftext|>"], np.int32),
            "positions": np.zeros((3, self.length), np.int32),
            "mask": np.arange(self.length) < real,
            "weights": np.zeros(self.length, np.float32),
            "patches": np.zeros((1, patches, media.values), np.float32),
            "slots": np.full((1, patches // media.merge**2), self.length, np.int32),
            "facts": self.facts.empty(self.length),
            "telling": np.zeros(self.length, bool),
        }
        example["tokens"][:real], example["positions"][:, :real] = tokens, positions
        example["weights"][:real] = self.context_weight
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of examples, with the pictures as ``Media``."""
        batch = stacked(examples)
        return batch | {"media": (Media(batch.pop("patches"), batch.pop("slots"), self.grid),)}
