"""How many tokens the MLLM reads of a prompt, by which `metacanvas prepare --by-bucket` sorts into buckets by length.

The number depends on the tokenizer and on what stands around the words: the system prompt, the chat template and media.
A sorted source remembers both, and a run that would need more tokens for the same prompts does not read it.
"""

from collections.abc import Sequence
from typing import Any

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data import by_size
from metacanvas_jax.data.examples import PaintExamples
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.prompt import Prompter
from metacanvas_jax.seals import json_hash
from metacanvas_jax.tasks import RECONSTRUCT, Bucket


class Lengths:
    """The tokens of prompts in the shapes of some buckets, as training would pad them."""

    def __init__(self, prompter: Prompter, buckets: Sequence[Bucket], video_fps: float):
        self._vocabulary = prompter.vocabulary
        self._examples = {
            bucket.size: PaintExamples(prompter, bucket, video_fps=video_fps) for bucket in buckets if bucket.by_length
        }

    def of(self, prompt: str, size: tuple[int, int]) -> int:
        """Tokens of a sample of a size, media included, before anything is cut."""
        examples = self._examples[size]
        return examples.needed(RECONSTRUCT if examples.bucket.task == "reconstruction" else prompt)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as JSON: the vocabulary, and for every size the tokens of the empty prompt."""
        empty = {f"{rows}x{columns}": one.needed("") for (rows, columns), one in sorted(self._examples.items())}
        return {"vocabulary": json_hash(self._vocabulary), "empty": empty}


def check(experiment: Experiment, prompter: Prompter) -> None:
    """Raises UserError for a source whose prompts were sorted by other lengths than they have in this run."""
    for section in experiment.sources:
        buckets = [one for one in experiment.shapes if one.task == section.task and one.by_length]
        if not section.by_size or not buckets:
            continue
        there = by_size.read(section.path).recipe.get("prompts")
        if there is None:  # the folders have other names, which is said where they are opened
            continue
        here = Lengths(prompter, buckets, experiment.mllm.video_fps).identity()
        again = "sort the samples for this config by `metacanvas prepare --by-bucket`"
        if there["vocabulary"] != here["vocabulary"]:
            raise UserError(
                f"{section.path}: its prompts were sorted by the tokens of another tokenizer than "
                f"{experiment.mllm.tokenizer}; {again}"
            )
        for size, tokens in here["empty"].items():
            if tokens > there["empty"].get(size, tokens):
                raise UserError(
                    f"{section.path}: its prompts of {size} were sorted with {there['empty'][size]} tokens around the "
                    f"words, and this run has {tokens} (system prompt, template and media); {again}"
                )
