"""The miniature's MLLM as a folder that ships with the package: taught, rounded to float16, examined, described."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config.networks import network
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.data.inputs import prompter
from metacanvas_jax.data.tokenizer import load_tokenizer, save_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.launch.training import train
from metacanvas_jax.miniature import exam
from metacanvas_jax.trees import parameter_count
from metacanvas_jax.types import Params
from metacanvas_jax.weights import saved

FOLDER = Path(__file__).resolve().parent / "mllm"
"""The MLLM that ships with the package: weights, tokenizer, config, examination and card."""

BARS = {
    "words": 0.95,
    "facts": 0.95,
    "facts of pictures: object": 0.9,
    "facts of pictures: colour": 0.9,
    "facts of pictures: place": 0.9,
    "pictures: object": 0.9,
    "pictures: colour": 0.9,
    "pictures: count": 0.9,
    "pictures: place": 0.9,
}
CHANCES = 0.05  # the largest mean error of the chances of a category
_ABOUT = {  # subjects by the first words of their questions
    "words": ("prompt:",),
    "pictures: object": ("picture: what is", "picture: is there"),
    "pictures: colour": ("picture: what colour",),
    "pictures: count": ("picture: how many",),
    "pictures: place": ("picture: where is",),
}
LARGEST = 4 * 2**20  # bytes of the weights

_CARD = """# The miniature's MLLM

An MLLM of {count:,} parameters (float16), taught from nothing by `make teach` to read prompts and pictures of the
miniature's world of OpenMoji scenes and to answer questions about both. The first channels of its states tell facts:
after each group of a prompt who it is, which colour, how many, where and in which relation; at the end of the prompt
the same of all groups; and on a sheet of cell names that stands after the prompt, where a canvas would, how likely each
part of each group lies in each cell (`metacanvas_jax/worlds/facts.py`). The demo freezes it. It knows nothing else.

`params.safetensors` are the weights, `tokenizer` its byte-level BPE, `config.json` how it was taught.

## Examination

{questions:,} questions about scenes and prompts that it never read, answered to the letter, and facts that the
states of new prompts and pictures tell (`exam.json`):

| about | right |
|---|---|
{rows}

The chances on its sheets are off, on average over the cells, by {chances}.

## Licence

Apache-2.0, as the code. It was taught with drawings of OpenMoji (https://openmoji.org), which are CC BY-SA 4.0; none
of them is in this folder.
"""


@dataclasses.dataclass(frozen=True)
class Exam:
    """Shares of right answers: by subject (those of ``BARS``), and by kind of question with their numbers.

    ``chances`` is the mean error of the chances on sheets, by category.
    """

    questions: int
    subjects: dict[str, float]
    chances: dict[str, float]
    kinds: dict[str, tuple[float, int]]

    def missed(self) -> list[str]:
        """The subjects that fall short of their bars."""
        short = {name: bar for name, bar in BARS.items() if self.subjects[name] < bar}
        wide = {name: error for name, error in self.chances.items() if error > CHANCES}
        missed = [f"{name} {self.subjects[name]:.3f} < {bar}" for name, bar in short.items()]
        return missed + [f"chances: {name} {error:.3f} > {CHANCES}" for name, error in wide.items()]

    def lines(self) -> list[str]:
        """The examination as a table of text."""
        rows = [(name, f"{share:.3f} of {count}") for name, (share, count) in self.kinds.items()]
        rows += [(name, f"{share:.3f}") for name, share in self.subjects.items()]
        rows += [(f"error of chances: {name}", f"{error:.3f}") for name, error in self.chances.items()]
        return [f"{name:<34} {value}" for name, value in rows]


def shipped_exam(folder: Path = FOLDER) -> Exam:
    """The examination of a folder that ``teach`` wrote. Raises UserError when it has none."""
    return Exam(**files.read_json(folder / "exam.json"))


def examine(setup: Experiment, params: Params, questions: int, seed: int = 1_000_003) -> Exam:
    """Asks an MLLM of the config (objective "understand") about new scenes and prompts."""
    model = network(setup)
    examples = UnderstandExamples(prompter(setup), setup.world, max(setup.mllm.buckets))
    answered = exam.interview(model, params, examples, questions, seed)
    subjects = {
        name: float(np.mean([one.right for one in answered if one.kind.startswith(kinds)]))
        for name, kinds in _ABOUT.items()
    }
    read = max(exam.BATCH, questions // 6)
    subjects["facts"], chances = exam.told_facts(model, params, examples, read, seed)
    told = exam.told_pictures(model, params, examples, read, seed)
    subjects |= {f"facts of pictures: {word}": share for word, share in told.items()}
    return Exam(questions, subjects, chances, exam.accuracy(answered))


def teach(config: ConfigDict, workdir: Path, out: Path, questions: int = 3000, progress: bool = True) -> Exam:
    """Teaches the MLLM of a config, continuing what is in ``workdir``, and writes the folder ``out``.

    Raises UserError for weights that are too large to ship and, before it teaches, for a folder that cannot be written.
    """
    files.check_writable(out / "exam.json")
    setup = experiment(config)
    prepare(setup)
    train(config, workdir, progress=progress)
    params, info = saved.load(workdir / "weights")
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > LARGEST:
        raise UserError(f"the weights have {size:,} bytes, more than the {LARGEST:,} that ship")
    result = examine(setup, jax.tree.map(lambda leaf: leaf.astype(np.float32), params), questions)
    saved.save(out, params, info["meta"])
    files.remove(out / "tokenizer")
    save_tokenizer(load_tokenizer(setup.mllm.tokenizer), out / "tokenizer")
    files.write(out / "config.json", config.to_json_best_effort(indent=2) + "\n")
    files.write(out / "exam.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    rows = "\n".join(f"| {name} | {share:.3f} |" for name, share in result.subjects.items())
    chances = ", ".join(f"{error:.3f} ({name})" for name, error in result.chances.items())
    card = _CARD.format(count=parameter_count(params), questions=questions, rows=rows, chances=chances)
    files.write(out / "README.md", card)
    return result
