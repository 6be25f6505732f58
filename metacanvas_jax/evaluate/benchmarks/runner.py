"""Draws a benchmark's tree, and says how it is scored."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from metacanvas_jax import files, seals
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import tree
from metacanvas_jax.evaluate.benchmarks import edits, geneval, texts, vbench
from metacanvas_jax.evaluate.benchmarks.base import Benchmark
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.types import Params

BENCHMARKS: dict[str, Benchmark] = {
    "geneval": geneval.BENCHMARK,
    "gedit": edits.GEDIT_BENCH,
    "imgedit": edits.IMGEDIT,
    "vbench": vbench.VBENCH,
    "vbench_i2v": vbench.VBENCH_I2V,
    "omnicontext": edits.OMNICONTEXT,
    "dpg": texts.DPG,
    "wise": texts.WISE,
}
"""By their names on the command line and in a config. A new one is a module here and a line in this table."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A finished tree: where it is, what was drawn now, and the official command that scores it."""

    benchmark: str
    out: Path
    entries: int
    results: int
    command: str

    def table(self) -> str:
        """Where the tree is and what scores it."""
        return f"{self.entries} entries in {self.out}, {self.results} results drawn now; scored by\n  {self.command}"

    def metrics(self) -> dict[str, float]:
        """None: the scores are those of the official script."""
        return {}

    def save(self, path: Path) -> None:
        """The same as JSON."""
        values = dataclasses.asdict(self) | {"out": str(self.out)}
        files.write(path, json.dumps(values, indent=1) + "\n")


def recipe_of(out: Path) -> Path:
    """The file that says what a tree was drawn with. It lies beside the tree, as the scripts read every file in it."""
    return out.with_name(f"{out.name}.recipe.json")


def scores_of(out: Path) -> Path:
    """The folder that the official command writes its results to."""
    return out.with_name(f"{out.name}.scores")


def evaluator(name: str) -> Any:
    """The evaluator of a benchmark."""

    def evaluate(painter: Painter, params: Params, asked: Asked) -> Drawn:
        return draw(name, painter, params, asked)

    return evaluate


def draw(name: str, painter: Painter, params: Params, asked: Asked) -> Drawn:
    """Draws a benchmark into ``asked.out``, or what is missing there.

    Raises UserError for data that are not the benchmark's, a run that does not draw its task, and a tree that was begun
    with other parameters or options.
    """
    setup, out = painter.setup, asked.out
    made = prepare(name, setup, asked)
    begin(out, recipe(name, setup, asked))
    options = {"guidance": asked.guidance, "canvas": asked.canvas}
    each, seed = asked.each or setup.eval.per_device, asked.seed or 0
    drawn = tree.draw(painter, params, made, out, each=each, seed=seed, progress=asked.progress, **options)
    if jax.process_index() == 0:
        with files.writing(scores_of(out)):
            scores_of(out).mkdir(parents=True, exist_ok=True)
    return Drawn(name, out, len(made), drawn, official(name, out, asked.data))


def official(name: str, out: Path, data: str) -> str:
    """The official command that scores a tree. It runs in the benchmark's repository, so that paths are absolute.

    It reads folders of this machine alone: what lies in a bucket is copied into that repository first, and the scores
    are copied back.
    """
    far = [place for place in (str(out), data) if place and not files.is_local(place)]

    def near(place: str) -> Path:
        return Path(place.rstrip("/").rpartition("/")[2]) if place in far else files.folder(place).absolute()

    tree, scores = near(str(out)), scores_of(near(str(out)))
    asked = BENCHMARKS[name].command(tree, str(near(data)) if data else data, scores)
    words = [f"gcloud storage cp -r {place} ." for place in far]
    if str(out) not in far:
        return " && ".join([*words, asked])
    return " && ".join([*words, f"mkdir -p {scores}", asked, f"gcloud storage cp -r {scores} {out.parent}/"])


def prepare(name: str, setup: Experiment, asked: Asked) -> list[tree.Entry]:
    """The entries of a benchmark, after all that can be wrong with them was looked at. Raises UserError as ``draw``."""
    if asked.out is None:
        raise UserError(f"the benchmark {name} needs --out: the folder of its tree")
    if not asked.canvas and setup.canvas is None and not asked.base:
        raise UserError("--no-canvas has no effect: this run has no canvas")
    made = entries(name, setup, asked)
    tree.check(made, asked.out)
    return made


def recipe(name: str, setup: Experiment, asked: Asked) -> dict[str, Any]:
    """What decides a tree beside the benchmark's own files."""
    return {
        "benchmark": name,
        "run": setup.name,
        "step": asked.step,
        "config": seals.json_hash(identity(setup)),
        "seed": asked.seed or 0,
        "guidance": setup.sampler.guidance if asked.guidance is None else asked.guidance,
        "steps": setup.sampler.steps,
        "canvas": asked.canvas and setup.canvas is not None,
        "base": asked.base,
    }


def entries(name: str, setup: Experiment, asked: Asked) -> list[tree.Entry]:
    """What a benchmark draws, up to ``asked.limit`` prompts."""
    if BENCHMARKS[name].needs_data and not asked.data:
        raise UserError(f"the benchmark {name} needs --data: its prompts and media (docs/evaluation.md)")
    made = tree.limited(BENCHMARKS[name].entries(setup, asked.data), asked.limit)
    if not made:
        raise UserError(f"{asked.data}: no prompts there")
    return made


def begin(out: Path, recipe: Mapping[str, Any], path: Path | None = None) -> None:
    """Notes what a tree is drawn with, beside it or in ``path``. Raises UserError for one begun with something else."""
    path = recipe_of(out) if path is None else path
    if path.exists():
        before = files.read_json(path)
        for key, value in recipe.items():
            if before.get(key) != value:
                raise UserError(
                    f"{out} was begun with {key} {before.get(key)!r}, now it is {value!r}: give another --out"
                )
    elif jax.process_index() == 0:
        files.write(path, json.dumps(recipe, indent=1) + "\n")
