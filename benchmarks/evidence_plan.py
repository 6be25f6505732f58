"""What benchmarks/evidence.py runs, and what the paper lets us expect: both were written before the runs.

Every hypothesis compares two variants that were trained on the same scenes with the same seeds.
"""

import dataclasses
from typing import Any

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a config of ``configs``, and values that differ from it."""

    name: str
    title: str
    config: str = "canvas"
    changes: tuple[tuple[str, Any], ...] = ()
    file: str = "evidence"


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A claim of the paper, or ours, that ``better`` reaches more than ``worse`` in a figure of a run."""

    claim: str
    better: str
    worse: str
    figure: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A figure or table of the paper."""

    name: str
    title: str
    variants: tuple[str, ...]
    hypotheses: tuple[Hypothesis, ...]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("canvas", "text and canvas"),
        Variant("canvas_only", "canvas only", "canvas_only"),
        Variant("text", "text only", "text"),
        Variant("metaquery", "MetaQuery", "metaquery"),
        Variant("text_metaquery", "text and MetaQuery", "text_metaquery"),
        Variant("no_time", "no time in the DiT block", "no_time"),
        Variant("no_dit_block", "no DiT block", "no_dit_block"),
        Variant("no_vanilla_block", "no vanilla block", "no_vanilla_block"),
        Variant("before_patchify", "canvas added before patchify", "before_patchify"),
        Variant("one_row", "canvas numbered as one row", changes=(("canvas.dims", 1),)),
        Variant("like_text", "canvas numbered like text", changes=(("canvas.rope", False),)),
        Variant("four_cells", "2 x 2 cells", "four_cells"),
        Variant("one_cell", "one cell", "one_cell"),
        Variant("mllm_lora", "adapters in the MLLM", "mllm_lora"),
        Variant("edit_canvas", "text and canvas", "edit_canvas", file="evidence_tasks"),
        Variant("edit_text", "text only", "edit_text", file="evidence_tasks"),
        *(
            Variant(f"motion_{count}", title, f"motion_{count}", file="evidence_tasks")
            for count, title in ((0, "no canvas"), (1, "1 keyframe"), (3, "3 keyframes"), (5, "5 keyframes"))
        ),
    )
}

SEEN, HELD_OUT, CURVE = "seen", "held out", "mean of the curve"
RIGHT = "right"  # of the results of all tasks
FRAMES = ": right frames"  # after the name of a task
SECONDS = "seen, at equal seconds"
"""The score of both when the faster one ends, by the median time of their steps."""

EXPERIMENTS = (
    Experiment(
        "figure_4",
        "How the prompt reaches the DiT (paper, Fig. 4)",
        ("canvas", "canvas_only", "text", "metaquery", "text_metaquery"),
        (
            Hypothesis("Text and canvas end better than text alone.", "canvas", "text", SEEN),
            Hypothesis("The same holds for combinations that training never showed.", "canvas", "text", HELD_OUT),
            Hypothesis("Text and canvas learn faster than text alone.", "canvas", "text", CURVE),
            Hypothesis("They do so in seconds, too.", "canvas", "text", SECONDS),
            Hypothesis("Text and canvas end better than text and MetaQuery.", "canvas", "text_metaquery", SEEN),
            Hypothesis("Text and canvas learn faster than text and MetaQuery.", "canvas", "text_metaquery", CURVE),
            Hypothesis("A canvas without text ends better than MetaQuery.", "canvas_only", "metaquery", SEEN),
        ),
    ),
    Experiment(
        "table_3",
        "The parts of the canvas connector (paper, Table 3)",
        ("canvas", "no_time", "no_dit_block", "no_vanilla_block", "before_patchify", "text"),
        tuple(
            Hypothesis(f"The full connector ends better than the one with {lacks}.", "canvas", name, SEEN)
            for name, lacks in (
                ("no_time", "no time in the DiT block"),
                ("no_dit_block", "no DiT block"),
                ("no_vanilla_block", "no vanilla block"),
                ("before_patchify", "the canvas added before patchify"),
            )
        ),
    ),
    Experiment(
        "table_10",
        "How canvas tokens are numbered (paper, Table 10)",
        ("canvas", "one_row", "like_text"),
        (
            Hypothesis("Multimodal RoPE ends better than positions like text.", "canvas", "like_text", SEEN),
            Hypothesis("Rows and columns end better than one row.", "canvas", "one_row", SEEN),
        ),
    ),
    Experiment(
        "cells",
        "How many cells the canvas has (not in the paper)",
        ("canvas", "four_cells", "one_cell", "text"),
        (
            Hypothesis("Ours: 4 x 4 cells end better than 2 x 2.", "canvas", "four_cells", SEEN),
            Hypothesis("Ours: 2 x 2 cells end better than one.", "four_cells", "one_cell", SEEN),
        ),
    ),
    Experiment(
        "adapters",
        "Adapters in the MLLM, on canvas tokens only (paper, B.5)",
        ("canvas", "mllm_lora"),
        (
            Hypothesis("With adapters in the MLLM it ends better.", "mllm_lora", "canvas", SEEN),
            Hypothesis("The same holds for combinations that training never showed.", "mllm_lora", "canvas", HELD_OUT),
        ),
    ),
    Experiment(
        "editing",
        "Image editing (paper, 3.2)",
        ("edit_canvas", "edit_text"),
        (
            Hypothesis("With a canvas more edits are right.", "edit_canvas", "edit_text", RIGHT),
            Hypothesis("With a canvas it learns faster.", "edit_canvas", "edit_text", CURVE),
        ),
    ),
    Experiment(
        "motion",
        "Keyframes of a canvas for videos (paper, Table 6)",
        ("motion_0", "motion_1", "motion_3", "motion_5"),
        (
            Hypothesis("One keyframe ends better than no canvas.", "motion_1", "motion_0", RIGHT),
            Hypothesis("The same holds for video editing alone.", "motion_1", "motion_0", "video editing"),
            Hypothesis("Three keyframes end better than no canvas.", "motion_3", "motion_0", RIGHT),
            Hypothesis("The same holds for video editing alone.", "motion_3", "motion_0", "video editing"),
            Hypothesis("Five keyframes are not needed: three end as well or better.", "motion_3", "motion_5", RIGHT),
        ),
    ),
)
