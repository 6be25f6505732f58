"""What a small MLLM understands: exact answers about scenes it has never read, and facts of new prompts."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from metacanvas_jax.data.batch import Batch, mllm_inputs
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.prompt import END
from metacanvas_jax.types import Params
from metacanvas_jax.worlds.facts import CHANCE, GROUPS
from metacanvas_jax.worlds.questions import Exchange, follow_up, picture_exchanges, text_exchanges
from metacanvas_jax.worlds.scenes import draw, place_request, sample_scene, sample_words

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


def told_facts(
    model: Mllm, params: Params, examples: UnderstandExamples, count: int, seed: int = 1_000_003
) -> tuple[float, dict[str, float]]:
    """What states tell of ``count`` new prompts: the share of words that are right, and the errors of chances.

    A word is told by the largest channel of its code, wherever the word is known on the prompt or its sheet. The error
    is the mean difference, over cells, between the chance that a group's drawing lies in a cell as the sheet tells it
    and as random pictures of the prompt have it; by the category of the prompt.
    """
    rng, facts, rows, requests = np.random.default_rng(seed), examples.facts, [], []
    while len(rows) < count:
        request, prompt = sample_words(rng, examples.world)
        if place_request(rng, examples.world, request):
            rows.append(examples.sheet(request, prompt))
            requests.append(request)

    states = _told(model, facts.count)
    right, errors = [], collections.defaultdict(list)
    for start in range(0, count, BATCH):
        some = rows[start : start + BATCH]
        batch = examples.collate(some + some[:1] * (BATCH - len(some)))
        told, known = np.asarray(states(params, batch))[: len(some)], batch["facts"][: len(some)]
        for group in range(GROUPS):
            for part in facts.slices.values():
                code = slice(group * facts.block + part.start, group * facts.block + part.stop)
                here = known[..., code].any(-1)
                right.append((told[here][:, code].argmax(-1) == known[here][:, code].argmax(-1)).astype(float))
        sheets = batch["mask"][: len(some)].sum(1)[:, None] - len(examples.names) + np.arange(len(examples.names))
        for request, row, expected, places in zip(requests[start:], told, known, sheets, strict=False):
            lies = [
                np.clip(x[places, GROUPS * facts.block :].reshape(len(places), GROUPS, -1).sum(-1) / CHANCE, 0.0, 1.0)
                for x in (row, expected)
            ]
            errors[request.category].append(np.abs(lies[0] - lies[1])[:, : len(request.groups)].mean())
    return float(np.concatenate(right).mean()), {name: float(np.mean(e)) for name, e in sorted(errors.items())}


def told_pictures(
    model: Mllm, params: Params, examples: UnderstandExamples, count: int, seed: int = 1_000_003
) -> dict[str, float]:
    """What the states of the tokens of ``count`` new pictures tell, by word: "object", "colour" and "place".

    The share of right words among the tokens in which a drawing lies; a word is told by the largest channel of its
    code. A connector reads the same channels.
    """
    rng, facts, rows, shown = np.random.default_rng(seed), examples.facts, [], []
    for _ in range(count):
        scene = sample_scene(rng, examples.world)
        exchange = picture_exchanges(rng, examples.world, scene)[1]  # the picture comes before any question
        rows.append(examples.encode([exchange], draw(examples.world, scene)))
        shown.append(facts.picture(scene.items))

    states = _told(model, facts.count)
    right = collections.defaultdict(list)
    for start in range(0, count, BATCH):
        some = rows[start : start + BATCH]
        hidden = np.asarray(states(params, examples.collate(some + some[:1] * (BATCH - len(some)))))
        for told, row, expected in zip(hidden, some, shown[start:], strict=False):
            told = told[row["slots"][0]]
            for word in ("object", "colour", "place"):
                code = facts.slices[word]
                here = expected[:, code].any(-1)
                right[word] += (told[here][:, code].argmax(-1) == expected[here][:, code].argmax(-1)).tolist()
    return {word: float(np.mean(values)) for word, values in right.items()}


def accuracy(answered: Sequence[Answered]) -> dict[str, tuple[float, int]]:
    """Share of right answers and number of questions, by kind of question."""
    by_kind = collections.defaultdict(list)
    for one in answered:
        by_kind[one.kind].append(one.right)
    return {kind: (float(np.mean(right)), len(right)) for kind, right in sorted(by_kind.items())}


def _told(model: Mllm, channels: int) -> Callable[[Params, Batch], Float[Array, "b l f"]]:
    """Reads of a batch what its states tell: the first channels."""

    @jax.jit
    def states(params: Params, batch: Batch) -> Float[Array, "b l f"]:
        context = model.apply({"params": params}, mllm_inputs(batch), cache=False, method="encode")
        return context.hidden[..., :channels].astype(jnp.float32)

    return states


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
