"""Prompts: chat template, placeholders for media, positions, and batches of static shape. On the host, in numpy.

A prompt is one user turn in the ChatML format. It ends at the end-of-sequence token of that turn, where the canvas
starts (paper, section 3.2). ``assistant=True`` opens the turn of the assistant after it, for generating text and for a
DiT that was trained on such prompts.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import MediaConfig, Patches
from metacanvas_jax.mllm.positions import RULES, MediaBlock, Rule, sequence_positions
from metacanvas_jax.mllm.template import CHAT
from metacanvas_jax.types import Grid, Media, MllmInputs

Part = str | Patches
Layout = tuple[tuple[Grid, int], ...]
"""The media of a batch: for each grid (in patches) the number of media of this grid that every sample may have."""

START, END, VISION_START, VISION_END = (CHAT[name] for name in ("start", "end", "vision_start", "vision_end"))
IMAGE, VIDEO, PADDING = (CHAT[name] for name in ("image", "video", "padding"))


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How prompts are worded and batched.

    ``buckets`` are the padded lengths, ascending. ``rule`` gives the positions of text after a video
    (``positions.py``). ``image_label`` is text before each image, where ``{}`` becomes its number from 1.
    ``tokens_per_second`` is a constant of the model: the positions that one second of video takes.
    ``media`` says how images and videos are read.
    """

    buckets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    system: str | None = "You are a helpful assistant."
    assistant: bool = False
    image_label: str = ""
    pad_left: bool = False
    rule: Rule = "published"
    tokens_per_second: float = 2.0
    media: MediaConfig = dataclasses.field(default_factory=MediaConfig)

    def __post_init__(self):
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets must be positive and ascending, not {self.buckets}")
        if self.rule not in RULES:
            raise ValueError(f"unknown position rule {self.rule!r}: choose from {RULES}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt without padding. ``media`` pairs patches with the places of their placeholder tokens."""

    tokens: Int[np.ndarray, " l"]
    positions: Int[np.ndarray, "3 l"]
    media: tuple[tuple[Patches, Int[np.ndarray, " _"]], ...] = ()


class Prompter:
    """Makes prompts with a tokenizer that has the special tokens of ChatML and of media, which it finds by name."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: PromptConfig):
        """Raises UserError if the tokenizer lacks one of the special tokens."""
        self.config = config
        # A copy, as its texts are words of users: what is spelt like a special token is text there.
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        special = (START, END, VISION_START, VISION_END, IMAGE, VIDEO, PADDING)
        self.ids = {token: self._encoder.token_to_id(token) for token in special}
        if missing := [token for token, number in self.ids.items() if number is None]:
            raise UserError(f"the tokenizer has no {', '.join(missing)}: expected special tokens of chats and media")
        self._reserved = frozenset(self.ids.values())
        self._newline = self._encode([CHAT["between"]])[0]
        system = []
        if config.system is not None:
            (text,) = self._texts([CHAT["system"] + config.system])
            system = [self.ids[START], *text, self.ids[END], *self._newline]
        self._head = np.asarray([*system, self.ids[START]], np.int32)
        opened = [*self._newline, self.ids[START], *self._encode([CHAT["assistant"]])[0]] if config.assistant else []
        self.opened = len(opened)  # tokens after the end of the user's turn
        self._tail = np.asarray([self.ids[END], *opened], np.int32)

    def __call__(self, parts: Part | Sequence[Part]) -> Prompt:
        """One prompt of texts and media in their order. Special tokens that a text spells are plain text."""
        parts = [parts] if isinstance(parts, str | Patches) else list(parts)
        # Text is encoded from one special token to the next, which is how the tokenizer itself would cut it.
        runs, media, shown, images = [CHAT["user"]], [], [], 0
        for part in parts:
            if isinstance(part, str):
                runs[-1] += part
                continue
            if part.seconds is None:
                images += 1
                runs[-1] += self.config.image_label.format(images)
            for words, block in zip(self._words(part), self.blocks(part), strict=True):
                runs[-1] += words
                shown.append((len(media), block))
                runs.append("")
            media.append(part)
        texts = self._texts(runs)
        tokens, lengths, places = [self._head, texts[0]], [len(self._head) + len(texts[0])], [[] for _ in media]
        for (number, block), text in zip(shown, texts[1:], strict=True):
            pad = self.ids[IMAGE if media[number].seconds is None else VIDEO]
            count = int(np.prod(block.grid))
            places[number].append(sum(map(len, tokens)) + 1 + np.arange(count))
            tokens += [[self.ids[VISION_START]], np.full(count, pad), [self.ids[VISION_END]], text]
            lengths[-1] += 1
            lengths += [block, 1 + len(text)]
        tokens.append(self._tail)
        lengths[-1] += len(self._tail)
        placed = tuple((patches, np.concatenate(own)) for patches, own in zip(media, places, strict=True))
        return Prompt(np.concatenate(tokens).astype(np.int32), sequence_positions(lengths, self.config.rule), placed)

    def text(self, text: str) -> Int[np.ndarray, " n"]:
        """Tokens of bare text, such as an answer."""
        return self._texts([text])[0]

    @property
    def vocabulary(self) -> dict[str, int]:
        """The tokens of plain text and their numbers."""
        return self._encoder.get_vocab(with_added_tokens=False)

    def cut(self, text: str, count: int) -> str:
        """The longest beginning of a text that has at most its first ``count`` tokens, and whole characters only.

        Of a text that has more than ``count`` tokens, or of any if ``count`` is not positive, it is a true part.
        """
        offsets = self._encoder.encode(text, add_special_tokens=False).offsets
        if count <= 0 or not text:
            return ""
        if count >= len(offsets):
            return text
        end, following = offsets[count - 1][1], offsets[count][0]
        return text[: min(end, following, len(text) - 1)].strip()

    def decode(self, tokens: Int[np.ndarray, " n"]) -> str:
        """Text of tokens, such as a generated answer."""
        return self._encoder.decode([int(token) for token in tokens]).strip()

    def texts(self, texts: Sequence[str]) -> list[Prompt]:
        """Many prompts of text only, encoded together, which is faster."""
        prompts = []
        for text in self._texts([f"user\n{text}" for text in texts]):
            tokens = np.concatenate([self._head, text, self._tail])
            positions = np.broadcast_to(np.arange(len(tokens), dtype=np.int32), (3, len(tokens)))
            prompts.append(Prompt(tokens, positions))
        return prompts

    def batch(
        self, prompts: Sequence[Prompt], *, length: int | None = None, layout: Layout | None = None
    ) -> MllmInputs:
        """Pads prompts to ``length`` and stacks them; without it, to the smallest bucket that holds them.

        ``layout`` fixes the media of the batch, so that all batches have the same shapes; without it, the layout is the
        smallest that holds the media of these prompts. Raises UserError for a prompt that is longer than the length or
        the largest bucket, or has more media than the layout.
        """
        longest = max(len(prompt.tokens) for prompt in prompts)
        if length is None:
            length = next((bucket for bucket in self.config.buckets if bucket >= longest), None)
        if length is None or longest > length:
            room = f"buckets {self.config.buckets}" if length is None else f"length {length}"
            raise UserError(f"a prompt of {longest} tokens does not fit {room}")
        tokens = np.full((len(prompts), length), self.ids[PADDING], np.int32)
        positions = np.zeros((3, *tokens.shape), np.int32)
        mask = np.zeros(tokens.shape, bool)
        starts = []
        for i, prompt in enumerate(prompts):
            start = length - len(prompt.tokens) if self.config.pad_left else 0
            real = slice(start, start + len(prompt.tokens))
            tokens[i, real], positions[:, i, real], mask[i, real] = prompt.tokens, prompt.positions, True
            starts.append(start)
        layout = needed_layout(prompts) if layout is None else layout
        return MllmInputs(tokens, positions, mask, self._media(prompts, starts, length, layout))

    def blocks(self, patches: Patches) -> list[MediaBlock]:
        """The places that an image or video takes among the positions: one block, or with timestamps one per grid."""
        media = self.config.media
        (t, h, w), merge = patches.grid, media.merge
        if media.timestamps:
            return [MediaBlock((1, h // merge, w // merge))] * t
        step = 1.0 if patches.seconds is None else self.config.tokens_per_second * patches.seconds
        return [MediaBlock((t, h // merge, w // merge), step)]

    def _words(self, patches: Patches) -> list[str]:
        """What is said before each block of a medium. Raises ValueError for a video whose times are not known."""
        if patches.seconds is None or not self.config.media.timestamps:
            return [""]
        if len(patches.times) != patches.grid[0]:
            raise ValueError(f"a video of {patches.grid[0]} temporal patches has {len(patches.times)} times")
        return [CHAT["time"].format(time) for time in patches.times]

    def _media(self, prompts: Sequence[Prompt], starts: list[int], length: int, layout: Layout) -> tuple[Media, ...]:
        room = dict(layout)
        for grid, count in needed_layout(prompts):
            if count > room.get(grid, 0):
                raise UserError(
                    f"a prompt has {count} media of grid {grid}, the layout of the batch has room for {layout}"
                )
        groups = []
        for grid, count in layout:
            merged = int(np.prod(grid)) // self.config.media.merge**2
            patches = np.zeros((len(prompts), count, int(np.prod(grid)), self.config.media.values), np.float32)
            slots = np.full((len(prompts), count, merged), length, np.int32)
            for b, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
                own = [(p, places) for p, places in prompt.media if p.grid == grid]
                for i, (p, places) in enumerate(own):
                    patches[b, i] = p.values
                    slots[b, i] = start + places
            groups.append(Media(patches, slots, grid))
        return tuple(groups)

    def _texts(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        encoded = self._encode(texts)
        for text, numbers in zip(texts, encoded, strict=True):
            if not self._reserved.isdisjoint(numbers):
                found = [token for token, number in self.ids.items() if number in numbers]
                raise UserError(f"the text {text[:80]!r} holds {found[0]}, which has a meaning of its own in a prompt")
        return [np.asarray(numbers, np.int32) for numbers in encoded]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def needed_layout(prompts: Sequence[Prompt]) -> Layout:
    """The smallest layout that holds the media of all these prompts, ordered by grid."""
    most = Counter()
    for prompt in prompts:
        most |= Counter(patches.grid for patches, _ in prompt.media)
    return tuple(sorted(most.items()))
