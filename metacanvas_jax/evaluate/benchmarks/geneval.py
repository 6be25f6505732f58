"""GenEval (djghosh13/geneval, MIT): 553 prompts of objects, colours, counts and positions, four pictures each."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.evaluate.benchmarks.base import Benchmark, Scores
from metacanvas_jax.evaluate.tree import Entry
from metacanvas_jax.paint.requests import Request

PROMPTS = Path(__file__).parent / "data" / "geneval_evaluation_metadata.jsonl"
PICTURES = 4
RESULTS = "results.jsonl"


def entries(setup: Experiment, data: str) -> list[Entry]:
    """``NUMBER/metadata.jsonl`` and ``NUMBER/samples/0000.png`` to ``0003.png``; the script takes digits only."""
    path = base.found(files.folder(data), "evaluation_metadata.jsonl") if data else PROMPTS
    made = []
    for number, row in enumerate(base.json_lines(path)):
        folder, prompt = f"{number:05d}", base.text_of(row, "prompt", f"{path}, line {number + 1}")
        base.text_of(row, "tag", f"{path}, line {number + 1}")
        for picture in range(PICTURES):
            png = f"{folder}/samples/{picture:04d}.png"
            about = {} if picture else {f"{folder}/metadata.jsonl": (json.dumps(row) + "\n").encode()}
            made.append(
                base.entry(
                    setup,
                    f"geneval {folder}",
                    Request(prompt, frames=1),
                    (*about, png),
                    lambda results, png=png, about=about: {**about, png: encode_png(results[0][0])},
                    numbers=(picture,),
                )
            )
    return made


def command(out: Path, data: str, scores: Path) -> str:
    """In the benchmark's repository."""
    results = scores / RESULTS
    return (
        f"python evaluation/evaluate_images.py {out} --outfile {results} --model-path DETECTOR_FOLDER && "
        f"python evaluation/summary_scores.py {results}"
    )


def scores(folder: Path) -> Scores:
    """The mean over the six tasks in percent, as ``summary_scores.py`` computes it, and each task."""
    path, right = folder / RESULTS, defaultdict(list)
    for row in base.json_lines(path):
        right[base.text_of(row, "tag", str(path))].append(bool(row.get("correct")))
    tasks = {tag: 100 * float(np.mean(values)) for tag, values in right.items()}
    return {"overall": float(np.mean(list(tasks.values()))), **tasks}


BENCHMARK = Benchmark(
    "GenEval",
    entries,
    command,
    scores,
    {
        "Table 3, text only": 64.09,
        "Table 3, MetaCanvas": 68.02,
        "Table 8, adapters": 86.0,
        "B.5, adapters in the MLLM": 87.0,
    },
    needs_data=False,
)
