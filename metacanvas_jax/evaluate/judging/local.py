"""A judge on the devices at hand: a published MLLM that this project runs, which answers with greedy decoding."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metacanvas_jax import files, registry
from metacanvas_jax.data.batch import batch_of, mllm_inputs
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.evaluate.judging.questions import Question
from metacanvas_jax.mllm import media
from metacanvas_jax.mllm.generation import Written, generate
from metacanvas_jax.mllm.media import MediaConfig, Patches
from metacanvas_jax.mllm.prompt import END, PADDING, Prompt, PromptConfig, Prompter, needed_layout
from metacanvas_jax.paint import placing
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.parallel import distributed
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import placed, shardings
from metacanvas_jax.trees import flat, nested, stays_float32
from metacanvas_jax.types import Params
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.sources import Source

TOKENS = 576  # of a picture, and of two frames of a video
FRAMES = 16  # of a video, at most
LENGTHS = tuple(256 * count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64))
MOST = 256  # tokens of an answer


def config_of(folder: str | Path) -> Any:
    """The sizes of a judge. Raises UserError for a folder that is missing or holds no MLLM that is built here."""
    return registry.published_config(folder, "mllm")


def check(folder: str | Path) -> None:
    """Raises UserError for a folder that misses what a judge needs. Of its weights only the headers are read."""
    config_of(folder)
    load_tokenizer(folder)
    Checkpoint(folder)


class LocalJudge:
    """The MLLM of a folder of transformers with its tokenizer.

    ``each`` questions are answered at once for every part of a batch, ``dtype`` is that of parameters and computation
    (None: bfloat16, on a CPU float32). ``most`` is the number of tokens of the longest answer, and ``tokens`` those of
    a picture. All processes ask it together. Raises UserError for a folder that is missing or holds no such MLLM.
    """

    def __init__(self, folder: str, *, each: int = 4, dtype: str | None = None, most: int = MOST, tokens: int = TOKENS):
        place = files.folder(folder)
        config = config_of(place)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        parts = {"language": dataclasses.replace(config.language, dtype=dtype)}
        parts["vision"] = dataclasses.replace(config.vision, dtype=dtype)
        config = dataclasses.replace(config, **parts)
        cut = {"patch": config.vision.patch, "merge": config.vision.merge, "tokens": tokens}
        sizes = dataclasses.replace(MediaConfig(**registry.of(config).media), **cut)
        self.name, self.each = str(folder), each
        self.prompter = Prompter(load_tokenizer(folder), PromptConfig(LENGTHS, assistant=True, media=sizes))
        self.params = _load(place, config, dtype)
        stop = (self.prompter.ids[END], self.prompter.ids[PADDING])
        self._written = jax.jit(functools.partial(_written, registry.module(config), most, stop))

    def answers(self, asked: Sequence[Question]) -> list[str]:
        """The raw answers, in the order of the questions; those of the same media are read as one batch."""
        prompts = [self.prompt(question) for question in asked]
        kind = lambda place: (needed_layout([prompts[place]]), _length(prompts[place]))  # noqa: E731
        answers = [""] * len(asked)
        for _, group in itertools.groupby(sorted(range(len(asked)), key=kind), kind):
            places = list(group)
            for place, answer in zip(places, self._of_one_shape([prompts[i] for i in places]), strict=True):
                answers[place] = answer
        return answers

    def prompt(self, question: Question) -> Prompt:
        """A question as tokens and patches."""
        parts = [part if isinstance(part, str) else self._media(part, question) for part in question.parts]
        return self.prompter(parts)

    def _media(self, frames: np.ndarray, question: Question) -> Patches:
        sizes = self.prompter.config.media
        if len(frames) == 1:
            return media.read_image(frames[0], sizes)
        chosen, fps = media.sample_frames(len(frames), question.fps, most=FRAMES, multiple=sizes.temporal_patch)
        return media.read_video(list(frames[chosen]), fps, sizes)

    def _of_one_shape(self, prompts: Sequence[Prompt]) -> list[str]:
        spread, answers = Spread.of(self.params), []
        size = self.each * spread.ways
        for start in range(0, len(prompts), size):
            real = list(prompts[start : start + size])
            filled = real + real[-1:] * (size - len(real))
            batch = batch_of(self.prompter.batch(filled[spread.share(size)], length=_length(filled[0])))
            with spread.open():
                written = self._written(self.params, spread.put(batch))
            tokens, lengths = (distributed.whole(x) for x in (written.tokens, written.lengths))
            answers += [self.prompter.decode(tokens[i, : lengths[i]]) for i in range(len(real))]
        return answers


def _written(model: Any, most: int, stop: Sequence[int], params: Params, batch: Any) -> Written:
    return generate(model, params, mllm_inputs(batch), most=most, stop=stop)


def _length(prompt: Prompt) -> int:
    """The padded length of a prompt; the longest of all where it has no room, which the prompter then says."""
    return next((length for length in LENGTHS if length >= len(prompt.tokens)), LENGTHS[-1])


def _load(folder: Path, config: Any, dtype: str) -> Params:
    """The parameters, copied to every device where they are small, else cut over all of them."""
    record = registry.of(config)
    boxed = jax.eval_shape(registry.module(config).init, jax.random.key(0), *record.arguments(config))["params"]
    devices = jax.devices()
    nbytes = sum(leaf.size for leaf in jax.tree.leaves(boxed)) * np.dtype(jax.numpy.dtype(dtype)).itemsize
    if jax.process_count() == 1 and devices[0].platform == "cpu":
        mesh = make_mesh(MeshConfig(), devices[:1])
    else:
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        memory = placing.memory_of(jax.local_devices()[0], len(devices))
        mesh = make_mesh(placing.config_for(nbytes, memory, slices), devices)
    rules = {"mllm": boxed}
    abstract = flat(placed(rules, shardings(rules, mesh)))
    held = {
        path: leaf if stays_float32(path, record.keep_float32) else leaf.update(dtype=jax.numpy.dtype(dtype))
        for path, leaf in abstract.items()
    }
    return Source("--judge", folder, record, config).load(nested(held)["mllm"])
