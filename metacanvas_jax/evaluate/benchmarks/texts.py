"""DPG-Bench (ELLA, Apache-2.0) and WISE (PKU-YuanGroup): long prompts, and prompts that need knowledge of the world."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.evaluate.benchmarks.base import Benchmark, Scores
from metacanvas_jax.evaluate.tree import Entry, Frames
from metacanvas_jax.paint.requests import Request

WISE_FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
WISE_WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}


def dpg_entries(setup: Experiment, data: str) -> list[Entry]:
    """``NAME.png`` for each ``NAME.txt``: four square pictures, two by two."""
    folder = files.folder(data)
    names = sorted(name for name in files.listing(folder) if name.endswith(".txt"))
    made, size = [], base.edit_size(setup, "text_to_image", (1, 1))
    for name in names:
        prompt, png = files.read_text(folder / name).strip(), f"{name.removesuffix('.txt')}.png"
        if not prompt:
            raise UserError(f"{folder / name}: no prompt there")
        request = Request(prompt, size=size, frames=1)

        def tiled(results: list[Frames], png: str = png) -> Mapping[str, bytes]:
            rows = [np.concatenate([results[i][0], results[i + 1][0]], axis=1) for i in (0, 2)]
            return {png: encode_png(np.concatenate(rows, axis=0))}

        made.append(base.entry(setup, f"dpg {name}", request, (png,), tiled, numbers=(0, 1, 2, 3)))
    return made


def dpg_command(out: Path, data: str, scores: Path) -> str:
    """In ELLA's repository; RESOLUTION is the side of one of the four pictures."""
    return f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {out} RESOLUTION | tee {scores}/dpg.txt"


def dpg_scores(folder: Path) -> Scores:
    """What the script prints last."""
    text = files.read_text(folder / "dpg.txt")
    found = re.search(r"DPG-Bench score: ([\d.]+)", text)
    if found is None:
        raise UserError(f"{folder / 'dpg.txt'}: no line 'DPG-Bench score: NUMBER'")
    return {"overall": float(found[1])}


def wise_entries(setup: Experiment, data: str) -> list[Entry]:
    """``NUMBER.png`` for each prompt of the three files."""
    folder, made = files.folder(data), []
    for stem in WISE_FILES:
        path = base.found(folder, f"{stem}_verified.json", f"{stem}.json")
        for place, row in enumerate(files.read_json(path, list)):
            where = f"{path}, entry {place}"
            if not isinstance(row, Mapping) or type(row.get("prompt_id")) is not int:
                raise UserError(f"{where}: expected an object with a whole number 'prompt_id'")
            png = f"{row['prompt_id']}.png"
            request = Request(base.text_of(row, "Prompt", where), frames=1)
            made.append(base.entry(setup, f"wise {png}", request, (png,), base.one_png(png)))
    return made


def wise_command(out: Path, data: str, scores: Path) -> str:
    """In WISE's repository, with its judge behind a server at 127.0.0.1:8000 (docs/evaluation.md names both)."""
    return f"IMAGE_DIR={out} bash EVAL_SCRIPT && cp {out}/Results*/*_scores_results.jsonl {scores}/"


def wise_scores(folder: Path) -> Scores:
    """The mean WiScore of all prompts; the official script also weights categories."""
    values = []
    for stem in WISE_FILES:
        for row in base.json_lines(folder / f"{stem}_scores_results.jsonl"):
            if all(isinstance(row.get(key), int | float) and row[key] <= 2 for key in WISE_WEIGHTS):
                values.append(sum(weight * row[key] for key, weight in WISE_WEIGHTS.items()) / 2)
    if not values:
        raise UserError(f"{folder}: no scores there")
    return {"mean WiScore": float(np.mean(values))}


DPG = Benchmark("DPG-Bench", dpg_entries, dpg_command, dpg_scores)
WISE = Benchmark("WISE", wise_entries, wise_command, wise_scores)
