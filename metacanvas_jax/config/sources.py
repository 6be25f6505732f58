"""The section of a config that describes one source of samples. ``data/sources.py`` opens it."""

import dataclasses
from typing import Literal

from metacanvas_jax.tasks import TASKS

Kind = Literal[
    "records",
    "tfds",
    "webdataset",
    "jsonl",
    "csv",
    "files",
    "parquet",
    "emoji_styles",
    "emoji_clips",
    "scenes",
    "edits",
    "animations",
]

DRAWN: dict[str, tuple[str, ...]] = {
    "scenes": ("text_to_image", "reconstruction"),
    "edits": ("image_editing",),
    "animations": ("text_to_video", "image_to_video", "video_editing", "reference_to_video"),
}
"""The kinds of source that draw their samples from a world, and the tasks that each of them serves."""

EMOJI: dict[str, tuple[str, ...]] = {
    "emoji_styles": ("text_to_image", "reconstruction", "image_editing"),
    "emoji_clips": ("text_to_video", "image_to_video", "video_editing", "reference_to_video"),
}
"""The kinds of source that read npm packages of emoji, and the tasks that each of them serves."""

PARTS = ("prompt", "target", "source", "references", "fps", "name", "task", "metadata", "scene", "arrays")
"""The parts of a sample that ``columns`` may name."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one medium may hold: encoded bytes, pixels of a frame, frames, and pixels of all frames read."""

    bytes: int = 1 << 30
    pixels: int = 1 << 26
    frames: int = 1 << 16
    decoded_pixels: int = 1 << 30


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class SourceSection:
    """One source of samples.

    ``kind`` is the layout of ``path``: "records" (what `metacanvas prepare` writes), "tfds" (any TFDS folder of
    array_records), "webdataset" (tars), "jsonl" and "csv" (media and a file of rows), "files" (``CLIP.mp4`` +
    ``CLIP.txt``) and "parquet"; tars and parquet files may be given by a pattern such as ``shards/*.tar``.
    "emoji_styles" and "emoji_clips" are npm packages below ``path``. "scenes", "edits" and "animations" are OpenMoji
    drawings with exact ground truth. They are drawn when they are read or, where ``path`` is given, once by
    `metacanvas prepare`.

    ``task`` is the task that the samples serve, ``weight`` their share among the sources of that task. ``columns`` are
    pairs (part of a sample, its name in the source) where the usual names do not apply. A run stops after ``max_skips``
    bad records; ``limits`` bound what one medium may hold. ``count`` and ``seed`` are those of drawings.
    ``latents`` trains on the latents that `metacanvas prepare --latents` stored beside the samples. A share
    ``validation`` of the samples, chosen by the hash of their names, is kept out of the training (``data/split.py``).
    With ``by_size`` the path is what `metacanvas prepare --by-bucket` wrote: a bucket reads the folder of its own size
    and length, and the buckets of the task are drawn as often as they have samples (``data/by_size.py``).
    """

    kind: Kind
    path: str = ""
    task: str = "text_to_image"
    weight: float = 1.0
    split: str = "train"
    columns: tuple[tuple[str, str], ...] = ()
    max_skips: int = 0
    in_memory: bool = False
    cache: str = ""
    limits: Limits = LIMITS
    count: int = 10_000
    seed: int = 0
    latents: bool = False
    validation: float = 0.0
    by_size: bool = False

    def __post_init__(self) -> None:
        drawn = self.kind in DRAWN
        if not drawn and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        served = (DRAWN | EMOJI).get(self.kind, TASKS)
        if self.task not in served:
            raise ValueError(f"{self.kind} serve for {', '.join(served)}, not for {self.task}")
        if self.weight < 0 or self.max_skips < 0:
            raise ValueError(f"weight {self.weight} and max_skips {self.max_skips} must not be negative")
        if self.latents and not (self.path and (drawn or self.kind == "records")):
            raise ValueError(f"latents are in records of `metacanvas prepare`, not in a source of kind {self.kind!r}")
        if self.by_size and self.kind != "records":
            raise ValueError(
                f"by_size is for what `metacanvas prepare --by-bucket` wrote, not for a source of kind {self.kind!r}"
            )
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}, expected a share of at least 0 and below 1")
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1")
        for name, kind in (("split", "tfds"), ("cache", "webdataset")):
            if getattr(self, name) != getattr(SourceSection, name) and self.kind != kind:
                raise ValueError(f"{name} has no effect on a source of kind {self.kind!r}, only on {kind!r}")
        if self.columns and (drawn or self.kind in EMOJI):
            raise ValueError(f"columns have no effect on a source of kind {self.kind!r}: its samples are drawn")
        for part, _ in self.columns:
            if part not in PARTS:
                raise ValueError(f"columns: {part!r} is no part of a sample; these are {', '.join(PARTS)}")
