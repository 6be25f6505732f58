"""What a small MLLM understands: exact answers to questions about scenes it has never read."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.prompt import END
from metacanvas_jax.types import Params
from metacanvas_jax.worlds.questions import Exchange, follow_up, picture_exchanges, text_exchanges
from metacanvas_jax.worlds.scenes import draw, sample_scene

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question, about a picture or (None) about its own words, the right answer and the model's."""

    exchange: Exchange
    image: UInt8[np.ndarray, "h w 3"] | None
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is right to the letter."""
        return self.answer == self.exchange.answer

    @property
    def kind(self) -> str:
        """The first words of the question, and what it is about."""
        words = " ".join(follow_up(self.exchange.question).split()[:2])
        return f"{'picture' if self.image is not None else 'prompt'}: {words}"


def interview(
    model: Mllm, params: Params, examples: UnderstandExamples, count: int, seed: int = 1_000_003
) -> list[Answered]:
    """Asks ``count`` questions about new scenes; answers are decoded greedily."""
    rng = np.random.default_rng(seed)
    asked: list[tuple[Exchange, UInt8[np.ndarray, "h w 3"] | None]] = []
    for number in range(count):
        scene = sample_scene(rng, examples.world)
        if number % 2:
            exchanges = picture_exchanges(rng, examples.world, scene)
            image = draw(examples.world, scene)
        else:
            exchanges, image = text_exchanges(rng, examples.world, scene.request, scene.prompt), None
        exchanges = [exchange for exchange in exchanges if examples.fits(exchange, image is not None)]
        asked.append((exchanges[rng.integers(len(exchanges))], image))

    @jax.jit
    def logits_at(params: Params, batch: dict, places: Int[Array, " b"]) -> Float[Array, "b v"]:
        context = model.apply({"params": params}, mllm_inputs(batch), cache=False, method="encode")
        hidden = jnp.take_along_axis(context.hidden, places[:, None, None], axis=1)
        return model.apply({"params": params}, hidden, method="logits")[:, 0]

    answers: list[str] = []
    for start in range(0, count, BATCH):
        answers += _answers(logits_at, params, examples, asked[start : start + BATCH])
    return [Answered(exchange, image, answer) for (exchange, image), answer in zip(asked, answers, strict=True)]


def accuracy(answered: Sequence[Answered]) -> dict[str, tuple[float, int]]:
    """Share of right answers and number of questions, by kind of question."""
    by_kind = collections.defaultdict(list)
    for one in answered:
        by_kind[one.kind].append(one.right)
    return {kind: (float(np.mean(right)), len(right)) for kind, right in sorted(by_kind.items())}


def _answers(logits_at, params: Params, examples: UnderstandExamples, asked: list) -> list[str]:
    """Greedy answers of one batch. The question is read again for every word: fast enough for short answers."""
    rows = asked + [asked[0]] * (BATCH - len(asked))
    batch = examples.collate([examples.encode([exchange], image) for exchange, image in rows])
    # Cut the right answers off again; what follows them is as the model writes it.
    questions = np.argmax(batch["weights"] == 1.0, axis=1)
    lengths = batch["mask"].sum(axis=1)
    width = batch["tokens"].shape[1]
    longest = int((lengths - questions).max())
    inside = np.arange(width)[None] < questions[:, None]
    tokens, mask = np.where(inside, batch["tokens"], 0), inside.copy()
    last = np.take_along_axis(batch["positions"].max(axis=1), questions[:, None] - 1, axis=1)
    step = np.arange(width)[None] - questions[:, None]
    positions = np.where(inside[:, None], batch["positions"], (last + 1 + step)[:, None]).astype(np.int32)
    batch |= {"positions": positions}
    end = examples.prompter.ids[END]
    written = np.full((len(rows), longest), end, np.int32)
    for i in range(longest):
        places = np.minimum(questions + i, width - 1)
        batch |= {"tokens": tokens.astype(np.int32), "mask": mask.copy()}
        chosen = np.asarray(jnp.argmax(logits_at(params, batch, jnp.asarray(places - 1, jnp.int32)), axis=-1))
        written[:, i] = chosen
        tokens[np.arange(len(rows)), places] = chosen
        mask[np.arange(len(rows)), places] = True
    texts = []
    for row in written[: len(asked)]:
        stop = np.argmax(row == end) if (row == end).any() else len(row)
        texts.append(examples.prompter.decode(row[:stop]))
    return texts
