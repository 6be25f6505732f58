"""The sections of docs/results.md that read the tables: what the runs say, and why.

The words were written when all rows were there. The figures in them are computed from the rows.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from evidence_plan import CURVE, FRAMES, HELD_OUT, RIGHT, SECONDS, SEEDS, SEEN, VARIANTS
from evidence_rows import Results, difference, figures, mean_and_error

TASK_VARIANTS = ("edit_canvas", "edit_text", "motion_0", "motion_1", "motion_3", "motion_5")
FIGURE_4 = ("canvas", "canvas_only", "text", "metaquery", "text_metaquery")
PAIRS = (
    *(("canvas", "text"), ("before_patchify", "text"), ("canvas", "no_dit_block"), ("like_text", "text")),
    *(("canvas", "one_row"), ("canvas", "four_cells"), ("four_cells", "one_cell"), ("mllm_lora", "canvas")),
)

READING = """## What the runs say

- **The order is the paper's.** Text and canvas paint {canvas} of seen prompts right, text alone {text}, a canvas alone
  {canvas_only}, text and MetaQuery {text_metaquery}, MetaQuery alone {metaquery}. Text and canvas lead text alone by
  {canvas-text} seen, {canvas-text/held out} held out, and {canvas-text/mean of the curve} over the whole curve.
- **The lead is shown early in a training, and not later.** After 3,000 steps, with one seed, text and canvas paint
  {longer/canvas/seen} of seen and {longer/canvas/held_out} of held-out prompts right, text alone {longer/text/seen} and
  {longer/text/held_out} ([demo.md](demo.md) asks why).
- **In seconds no lead is shown**: {canvas-text/seen, at equal seconds} where text alone ends. There the learning rate
  of the runs with a canvas is still high, which is to their disadvantage. MLLM and DiT have the same size in this
  miniature, so that a step with a canvas takes {slower} times as long. At full size the planned time of a step grows by
  3 % for videos (Wan) and up to twofold for SANA under a 7B MLLM ([performance.md](performance.md)).
- **Of the connector, the place matters most.** Added before patchify, the canvas is worse than none
  ({before_patchify-text}). The parts of the connector make less of a difference than can be told with three seeds
  (full connector against none of the DiT block: {canvas-no_dit_block}). The paper's differences between these rows, 0.6
  to 1.8 points of GenEval, are below what these runs can show.
- **Positions matter**: numbered like text, the canvas is no better than none ({like_text-text}), and what it adds says
  less of where things may lie (below). The MLLM was taught with cells that are numbered by rows and columns, as a
  published one was taught with pictures. One row of 16 cells does as well as rows and columns ({canvas-one_row}): here
  the first embeddings of the canvas tokens name their cells.
- **Cells matter**: each halving of rows and columns costs right pictures (4 x 4 against 2 x 2 {canvas-four_cells},
  2 x 2 against one {four_cells-one_cell}). One cell can say what to paint, but not where.
- **Adapters in the MLLM add nothing here** ({mllm_lora-canvas}): this MLLM was taught to plan in its cells, and a
  published one was not.
- **Where a canvas helps**: prompts that name a place ({canvas-text/place}) or a relation ({canvas-text/position}).
  Where the layout is open, neither gain nor harm is shown (two objects: {canvas-text/two_object}, with colours:
  {canvas-text/color_attr}).
"""

TASKS = """- **A canvas helps to edit pictures**: {edit_canvas-edit_text/right} at the end, and
  {edit_canvas-edit_text/mean of the curve} over the curve. It helps most with the number of drawings
  ({edit_canvas-edit_text/count}), then with added drawings ({edit_canvas-edit_text/add}). Drawings are moved,
  recoloured and removed nearly always right without one. A step with a canvas took {edit_canvas/slower} times as long
  in these runs, with other work beside them; read where text alone ends, the lead is about
  {edit_canvas-edit_text/seconds}. With the canvas come the MLLM and its adapters. How much is due to each was not
  measured.
- **A canvas of one keyframe helps videos; more keyframes cannot be told from one.** After 2,000 steps of 12 clips few
  videos are right in all five frames, and none that was made from words. Frame by frame, a figure that was chosen
  after the runs, one keyframe gains {motion_1-motion_0/text to video: right frames} from words and
  {motion_1-motion_0/video editing: right frames} in video editing, three keyframes gain
  {motion_3-motion_0/text to video: right frames} and {motion_3-motion_0/video editing: right frames}. Five against
  three: {motion_5-motion_3/text to video: right frames} and {motion_5-motion_3/video editing: right frames}. Whether
  three keyframes are better than one (paper, Table 6) is neither shown nor refuted.
"""

WHY = """## Why

![Pictures and canvas maps](results/maps.png)

Right pictures (above) and wrong ones of one run with text and canvas, with the prompt and the judge's first reason.
Below each is its canvas map, laid over it. Where two places have the same colour, the canvas says the same. Where a
prompt names places or a relation, the maps show them. Where it leaves the layout open ("a house and a duck"), the map
is nearly the same everywhere. What is wrong then is mostly that one object stands there twice and the other is missing.

"""


def reading(results: Results) -> str:
    """The section that says what the runs say; nothing before all runs of scenes are there."""
    if any((name, seed) not in results.rows for name in {*FIGURE_4, *itertools.chain(*PAIRS)} for seed in SEEDS):
        return ""
    filled = {name: _share(results, name) for name in FIGURE_4}
    for figure in (SEEN, HELD_OUT, CURVE, SECONDS, "place", "position", "two_object", "color_attr"):
        filled[f"canvas-text/{figure}"] = _signed(results, "canvas", "text", figure)
    for name, scores in results.longer.items():
        filled |= {f"longer/{name}/{split}": _plain(scores[split]["pictures"], "{:.3f}".format) for split in scores}
    for one, other in PAIRS:
        filled[f"{one}-{other}"] = _signed(results, one, other, SEEN)
    paces = results.paces
    filled["slower"] = f"{paces['canvas'] / paces['text']:.1f}" if {"canvas", "text"} <= paces.keys() else "-"
    text = READING
    if all((name, seed) in results.rows for name in TASK_VARIANTS for seed in SEEDS):
        filled |= _of_tasks(results)
        text += TASKS
    for key, value in filled.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _of_tasks(results: Results) -> dict[str, str]:
    """The figures that ``TASKS`` names."""
    filled = {}
    for figure in (RIGHT, CURVE, "count", "add"):
        filled[f"edit_canvas-edit_text/{figure}"] = _signed(results, "edit_canvas", "edit_text", figure)
    for one, other in (("motion_1", "motion_0"), ("motion_3", "motion_0"), ("motion_5", "motion_3")):
        for task in ("text to video", "video editing"):
            filled[f"{one}-{other}/{task}{FRAMES}"] = _signed(results, one, other, f"{task}{FRAMES}")
    paces = {
        name: float(np.median([results.rows[name, seed]["seconds_per_step"] for seed in SEEDS]))
        for name in ("edit_canvas", "edit_text")
    }
    filled["edit_canvas/slower"] = f"{paces['edit_canvas'] / paces['edit_text']:.1f}"
    timed = Results(results.rows, paces)
    filled["edit_canvas-edit_text/seconds"] = _signed(timed, "edit_canvas", "edit_text", SECONDS)
    return filled


def why(found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Tables of what benchmarks/evidence_analysis.py found, mean and standard error over seeds."""
    parts = [WHY]
    if faults := found.get("faults"):
        kinds = list(next(iter(next(iter(faults.values())).values())))
        lines = [
            f"| seen prompts, pictures with | {' | '.join(kinds)} |",
            "|---" * (len(kinds) + 1) + "|",
        ]
        for name, seeds in faults.items():
            cells = [mean_and_error([one[kind] for one in seeds.values()]) for kind in kinds]
            lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n\n")
    if probe := found.get("probe"):
        lines = ["| what the canvas adds to a patch tells how likely the first group lies there | R² |", "|---|---|"]
        lines += [
            f"| {VARIANTS[name].title} | {mean_and_error(list(seeds.values()))} |" for name, seeds in probe.items()
        ]
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _share(results: Results, name: str) -> str:
    return _plain(float(np.mean([figures(results.rows[name, seed])[SEEN] for seed in SEEDS])), "{:.3f}".format)


def _signed(results: Results, one: str, other: str, figure: str) -> str:
    mean, error, _ = difference(results, one, other, figure)
    if not np.isfinite(error):
        return "not measured"
    return f"{_plain(mean, '{:+.3f}'.format)} ± {_plain(error, '{:.3f}'.format)}"


def _plain(value: float, form: Callable[[float], str]) -> str:
    """Without the zero before the point."""
    return form(value).replace("0.", ".", 1)
