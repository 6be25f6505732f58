"""VBench and VBench-I2V (Vchitect, Apache-2.0): flat folders of videos named after their prompts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import LIMITS
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.evaluate.benchmarks.base import Benchmark, Scores
from metacanvas_jax.evaluate.tree import Entry
from metacanvas_jax.paint import requests
from metacanvas_jax.paint.requests import Request

VIDEOS, FLICKERING = 5, 25  # of a prompt, and of one whose flickering is measured: a filter then keeps static ones
RATIOS = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}


def rows(data: str, name: str) -> dict[str, dict]:
    """The rows of an info file by prompt. A prompt of several rows has the dimensions of all of them."""
    path, found = base.found(files.folder(data), name), {}
    for place, row in enumerate(files.read_json(path, list)):
        where = f"{path}, entry {place}"
        if not isinstance(row, Mapping) or not isinstance(row.get("dimension"), list):
            raise UserError(f"{where}: expected an object with a list 'dimension'")
        prompt = base.file_name(base.text_of(row, "prompt_en", where), where)
        before = found.setdefault(prompt, {**row, "dimension": []})
        if row.get("image_name") != before.get("image_name"):
            raise UserError(f"{where}: the prompt {prompt!r} is there twice, with different images")
        before["dimension"] = [*before["dimension"], *row["dimension"]]
    return found


def entries(setup: Experiment, data: str) -> list[Entry]:
    """``PROMPT-0.mp4`` to ``-4.mp4``, or ``-24.mp4`` where temporal flickering is measured."""
    fps, made = requests.nearest(setup, "text_to_video").fps, []
    request = Request("", frames=requests.nearest(setup, "text_to_video").frames)
    for prompt, row in rows(data, "VBench_full_info.json").items():
        count = FLICKERING if "temporal_flickering" in row["dimension"] else VIDEOS
        made += _videos(setup, Request(prompt, frames=request.frames), prompt, fps, count)
    return made


def i2v_entries(setup: Experiment, data: str) -> list[Entry]:
    """The same for videos that begin with the picture of the aspect ratio nearest to the run's."""
    near, made = requests.nearest(setup, "image_to_video"), []
    images = files.folder(data) / "data" / "crop" / ratio_of(setup)
    if not images.is_dir():
        images = files.folder(data) / "crop" / ratio_of(setup)
    there, read = set(files.listing(images)) if images.is_dir() else set(), set()
    for prompt, row in rows(data, "vbench2_i2v_full_info.json").items():
        name = row.get("image_name") or f"{prompt.rpartition(', camera ')[0] or prompt}.jpg"
        if name not in there:
            raise UserError(f"{images / name}: no such image, which the prompt {prompt!r} needs")
        if name not in read:
            base.sides_of(files.read_bytes(images / name, LIMITS.bytes), str(images / name))
            read.add(name)
        made += _videos(setup, Request(prompt, image=images / name), prompt, near.fps, VIDEOS)
    return made


def ratio_of(setup: Experiment) -> str:
    """The name of the aspect ratio that is nearest to the run's videos."""
    height, width = requests.nearest(setup, "image_to_video").size
    return min(RATIOS, key=lambda name: abs(np.log(RATIOS[name] * height / width)))


def _videos(setup: Experiment, request: Request, prompt: str, fps: float, count: int) -> list[Entry]:
    return [
        base.entry(
            setup,
            f"vbench {prompt}",
            request,
            (f"{prompt}-{number}.mp4",),
            base.one_mp4(f"{prompt}-{number}.mp4", fps),
            numbers=(number,),
        )
        for number in range(count)
    ]


def command(out: Path, data: str, scores: Path) -> str:
    """For each dimension; static videos of temporal flickering are chosen first."""
    return (
        f"vbench static_filter --videos_path {out} && for D in DIMENSIONS; do vbench evaluate --videos_path {out} "
        f"--dimension $D --output_path {scores}; done && zip -j {scores}.zip {scores}/*_eval_results.json && "
        f"python scripts/cal_final_score.py --zip_file {scores}.zip --model_name MODEL | tee {scores}/final.txt"
    )


def i2v_command(out: Path, data: str, scores: Path) -> str:
    """For each dimension, with the aspect ratio whose images the videos begin with."""
    return (
        f"for D in DIMENSIONS; do python evaluate_i2v.py --videos_path {out} --dimension $D --ratio RATIO "
        f"--output_path {scores}; done && zip -j {scores}.zip {scores}/*_eval_results.json && "
        f"python scripts/cal_i2v_final_score.py --zip_file {scores}.zip --model_name MODEL | tee {scores}/final.txt"
    )


def scores(folder: Path) -> Scores:
    """What the final script prints, in percent: ``|   total score|0.81|``."""
    values = {}
    for line in files.read_text(folder / "final.txt").splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if len(parts) == 2 and parts[0].lower().endswith("score"):
            values[parts[0].lower()] = 100 * float(parts[1])
    if "total score" not in values:
        raise UserError(f"{folder / 'final.txt'}: no line '| total score|NUMBER|'")
    return {"total score": values.pop("total score"), **values}


VBENCH = Benchmark("VBench", entries, command, scores)
VBENCH_I2V = Benchmark(
    "VBench-I2V", i2v_entries, i2v_command, scores, {"Table 4, published backbone": 86.98, "Table 4, MetaCanvas": 87.13}
)
