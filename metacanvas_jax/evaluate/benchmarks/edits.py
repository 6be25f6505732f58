"""GEdit-Bench (Step1X-Edit, Apache-2.0), ImgEdit-Bench (PKU-YuanGroup) and OmniContext (OmniGen2, Apache-2.0)."""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import LIMITS
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.evaluate.benchmarks.base import Benchmark, Scores
from metacanvas_jax.evaluate.benchmarks.tables import Table
from metacanvas_jax.evaluate.tree import Entry
from metacanvas_jax.paint.requests import Request

OMNICONTEXT_SIDE = 1024
GEDIT = ("task_type", "key", "instruction", "instruction_language", "input_image")


def _edit(setup: Experiment, name: str, prompt: str, read, sides: tuple[int, int], png: str, others=None) -> Entry:
    """The edit of a picture, which ``read`` returns, as ``png``; ``others`` makes further files of it."""
    size = base.edit_size(setup, "image_editing", sides)
    stand_in = np.zeros((*size, 3), np.uint8)
    request = Request(prompt, image=stand_in, edit=True, size=size)
    paths = (*(others or {}), png)

    def made(results) -> Mapping[str, bytes]:
        extra = {path: make() for path, make in (others or {}).items()}
        return {**extra, png: encode_png(base.with_aspect_of(results[0][0], sides))}

    return base.entry(setup, name, request, paths, made, media=lambda: {"image": base.resized(read(), size)})


def gedit_entries(setup: Experiment, data: str) -> list[Entry]:
    """``fullset/TASK_TYPE/LANGUAGE/KEY.png``, and beside it ``KEY_SRCIMG.png``, without which the script skips it."""
    table, made = Table(data, GEDIT, images=("input_image", "input_image_raw")), []
    for index, row in enumerate(table.rows):
        where = table.name(index)
        task, key, prompt, language = (
            base.text_of(row, name, where) for name in ("task_type", "key", "instruction", "instruction_language")
        )
        parts = [base.file_name(part, where) for part in (task, language, key)]
        stem = f"fullset/{'/'.join(parts)}"
        given = "input_image_raw" if "input_image_raw" in table.images else "input_image"
        made.append(
            _edit(
                setup,
                f"gedit {stem}",
                prompt,
                lambda index=index, given=given: table.picture(index, given),
                base.sides_of(table.encoded(index, given), where),
                f"{stem}.png",
                {f"{stem}_SRCIMG.png": lambda index=index: encode_png(table.picture(index, "input_image"))},
            )
        )
    return made


def gedit_command(out: Path, data: str, scores: Path) -> str:
    """In Step1X-Edit's GEdit-Bench; the folder above the tree is that of all models."""
    return (
        f"python test_gedit_score.py --model_name {out.name} --save_path {out.parent} --backbone BACKBONE && "
        f"cp -r {out.parent}/*/*_vie_score.csv {scores}/ && python calculate_statistics.py --model_name {out.name} "
        f"--save_path {out.parent} --backbone BACKBONE --language en"
    )


def gedit_scores(folder: Path) -> Scores:
    """G_O, G_SC and G_PQ of the English instructions: means of each group, then over the groups."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in sorted(files.listing(folder)):
        if not name.endswith("_vie_score.csv"):
            continue
        for row in csv.DictReader(io.StringIO(files.read_text(folder / name))):
            if row.get("instruction_language") == "en":
                try:
                    groups[name].append((float(row["sementics_score"]), float(row["quality_score"])))
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(f"{folder / name}: no numbers sementics_score and quality_score") from error
    if not groups:
        raise UserError(f"{folder}: no *_vie_score.csv there")

    def over(score: Callable[[float, float], float]) -> float:
        return float(np.mean([np.mean([score(*pair) for pair in rows]) for rows in groups.values()]))

    return {"G_O": over(lambda s, q: math.sqrt(s * q)), "G_SC": over(lambda s, q: s), "G_PQ": over(lambda s, q: q)}


def imgedit_entries(setup: Experiment, data: str) -> list[Entry]:
    """``KEY.png`` for each of ``basic_edit.json``; the originals lie beside it, or in ``Benchmark``."""
    folder, made = files.folder(data), []
    path = base.found(folder, "basic_edit.json")
    rows = _once(files.read_text(path), path)
    roots = [folder / name for name in ("", "Benchmark", "Benchmark/singleturn", "singleturn")]
    for key, row in rows.items():
        where = f"{path}, {key}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        origin = base.text_of(row, "id", where)
        image = next((root / origin for root in roots if (root / origin).is_file()), None)
        if image is None:
            raise UserError(f"{where}: no image {origin} in {folder}")
        made.append(
            _edit(
                setup,
                f"imgedit {key}",
                base.text_of(row, "prompt", where),
                lambda image=image: base.picture_in(image),
                base.sides_of(files.read_bytes(image, LIMITS.bytes), str(image)),
                f"{base.file_name(key, where)}.png",
            )
        )
    return made


def _once(text: str, path: Path) -> dict[str, Any]:
    """A JSON object no key of which is there twice. Raises UserError for anything else."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in found]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: the key {twice!r} is there twice")
        return dict(found)

    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def imgedit_command(out: Path, data: str, scores: Path) -> str:
    """In ImgEdit's Benchmark/Basic."""
    return (
        f"python basic_bench.py --result_img_folder {out} --edit_json {data}/basic_edit.json "
        f"--origin_img_root ORIGINALS --prompts_json prompts.json && "
        f"python step1_get_avgscore.py --result_json {out}/result.json --average_score_json {scores}/average.json && "
        f"python step2_typescore.py --average_score_json {scores}/average.json "
        f"--basic_edit {data}/basic_edit.json --typescore_json {scores}/types.json"
    )


def imgedit_scores(folder: Path) -> Scores:
    """The mean over edits, and the mean of each type."""
    values = files.read_json(folder / "average.json")
    types = files.read_json(folder / "types.json")
    if not values or not all(isinstance(value, int | float) for value in (*values.values(), *types.values())):
        raise UserError(f"{folder / 'average.json'}: expected numbers")
    return {"overall": float(np.mean(list(values.values()))), **types}


def omnicontext_entries(setup: Experiment, data: str) -> list[Entry]:
    """``fullset/TASK_TYPE/KEY.png``, 1024 x 1024: of a video its middle frame."""
    table, made = Table(data, ("key", "task_type", "instruction", "input_images"), images=("input_images",)), []
    size = base.edit_size(setup, "reference_to_video", (1, 1))
    for index, row in enumerate(table.rows):
        where = table.name(index)
        task, key = (base.file_name(base.text_of(row, name, where), where) for name in ("task_type", "key"))
        png, given = f"fullset/{task}/{key}.png", table.all_encoded(index, "input_images")
        if not given:
            raise UserError(f"{where}: input_images is empty")
        for encoded in given:
            base.sides_of(encoded, where)
        stand_in = (np.zeros((*size, 3), np.uint8),) * len(given)
        request = Request(base.text_of(row, "instruction", where), references=stand_in, size=size)

        def square(results, png=png) -> Mapping[str, bytes]:
            middle = results[0][len(results[0]) // 2]
            return {png: encode_png(base.resized(middle, (OMNICONTEXT_SIDE, OMNICONTEXT_SIDE)))}

        made.append(
            base.entry(
                setup,
                f"omnicontext {task}/{key}",
                request,
                (png,),
                square,
                media=lambda index=index: {"references": table.pictures(index, "input_images")},
            )
        )
    return made


def omnicontext_command(out: Path, data: str, scores: Path) -> str:
    """In OmniGen2's omnicontext."""
    return (
        f"python -m omnicontext.test_omnicontext_score --test_data {data} --result_dir {out.parent} "
        f"--model_name {out.name} --output_dir {scores} --openai_url URL"
    )


def omnicontext_scores(folder: Path) -> Scores:
    """The mean over tasks of sqrt(PF x SC), of every JSONL row with these two scores."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for name in sorted(files.listing(folder, deep=True)):
        if not name.endswith(".jsonl"):
            continue
        for row in base.json_lines(folder / name):
            both = [row.get(key) for key in ("PF_score", "SC_score")]
            if all(isinstance(value, int | float) for value in both):
                tasks[str(row.get("task_type"))].append(math.sqrt(both[0] * both[1]))
    if not tasks:
        raise UserError(f"{folder}: no JSONL file with PF_score and SC_score there")
    means = {task: float(np.mean(values)) for task, values in tasks.items()}
    return {"overall": float(np.mean(list(means.values()))), **means}


GEDIT_BENCH = Benchmark(
    "GEdit-Bench-EN",
    gedit_entries,
    gedit_command,
    gedit_scores,
    {"3.2, published backbone": 6.00, "3.2, MetaCanvas": 7.67},
)
IMGEDIT = Benchmark(
    "ImgEdit-Bench",
    imgedit_entries,
    imgedit_command,
    imgedit_scores,
    {"3.2, published backbone": 3.52, "3.2, MetaCanvas": 3.86},
)
OMNICONTEXT = Benchmark("OmniContext", omnicontext_entries, omnicontext_command, omnicontext_scores, {"Table 7": 5.40})
