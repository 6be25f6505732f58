"""From a row of any layout (names and encoded values) to a sample of a task."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from metacanvas_jax.config.sources import LIMITS, Limits
from metacanvas_jax.data.decoding import MediaError, decode_animation, decode_image
from metacanvas_jax.data.samples import SOURCE_FRAMES, Sample
from metacanvas_jax.data.transforms import (
    AS_FOUND,
    LEAST_FPS,
    MOST_FPS,
    Clip,
    fit_frames,
    fit_image,
    frame_indices,
)
from metacanvas_jax.data.video import container_of, decode_video
from metacanvas_jax.tasks import TASKS

MEDIA = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "mp4", "webm", "mov", "mkv")
"""Extensions of the pictures and videos that are read."""

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "txt", "caption", "text", "instruction", "edit", "edited_prompt_list", "edit_prompt"),
    "target": (
        *("target", "edited_img", "output_image", "image", "video", "file_name"),
        *MEDIA,
    ),
    "source": ("source", "src_img", "input_image", "source_image", "source_video"),
    "references": ("references",),
    "fps": ("fps",),
    "name": ("__key__",),
    "task": (),
    "metadata": (),
    "scene": (),
    "arrays": (),
}
"""What each part of a sample is called where the config does not say, the first that there is. The names are those of
WebDataset extensions (BLIP3o), of HF image folders, and of the columns of OmniEdit and HQ-Edit."""

STORED = {part: part for part in NAMES}
"""What they are called in the array_record folders of `metacanvas prepare`."""

_NUMBERED = re.compile(r"references?[._-]?(\d+)", re.IGNORECASE)
MOST_REFERENCES = 64  # of one sample

_PART_NAMES = {name for part in ("target", "source", "references") for name in NAMES[part] if name not in MEDIA}

SOURCED = tuple(name for name, task in TASKS.items() if task.vae == "source")
VIDEO = tuple(name for name, task in TASKS.items() if task.makes == "video")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How rows become samples.

    ``task`` is what they serve for (None: what the row says, or text-to-image). ``columns`` names parts of a sample
    otherwise; "json.caption" is a key inside JSON. ``open`` turns a path that stands in a row into bytes (None: rows
    hold the bytes themselves). With ``first_frame`` no more than that of a target is decoded: its latents are stored.
    Raises ValueError for a column of no part of a sample.
    """

    task: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clip: Clip = AS_FOUND
    limits: Limits = LIMITS
    open: Callable[[str], bytes] | None = None
    first_frame: bool = False

    def __post_init__(self) -> None:
        for part in self.columns:
            if part not in NAMES:
                raise ValueError(f"columns: {part!r} is no part of a sample; these are {', '.join(NAMES)}")

    def keys(self) -> set[str]:
        """Every column that may be asked for."""
        named = {self.columns.get(part) for part in NAMES} - {None}
        return {key.partition(".")[0] for key in named} | {k for names in NAMES.values() for k in names} | {"json"}

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """The sample of a row. Raises MediaError for what is missing, of another type or unreadable."""
        task = self.task or _text(self._get(row, "task"), "task") or "text_to_image"
        rate = _rate(self._get(row, "fps")) if task in VIDEO else None
        target, fps = self._target._frames(self._get(row, "target", True), rate, task)
        # What a task does not need may be anything, such as the name of a collection under the key "source".
        source = self._get(row, "source", True) if task in SOURCED else None
        references = self._get(row, "references", True) if task == "reference_to_video" else None
        empty = source is None or (isinstance(source, list | tuple | np.ndarray) and len(source) == 0)
        arrays = _arrays(self._get(row, "arrays"))
        kept = arrays.get(SOURCE_FRAMES)
        rule = self if kept is None else dataclasses.replace(self, clip=Clip(self.clip.size, len(kept)))
        sample = Sample(
            prompt=_text(self._get(row, "prompt", task != "reconstruction"), "prompt"),
            target=target,
            task=task,
            source=None if empty else rule._frames(source, rate, task)[0],
            references=tuple(self._picture(item) for item in _references(references)),
            fps=fps,
            name=_text(self._get(row, "name"), "name"),
            metadata=_text(self._get(row, "metadata"), "metadata"),
            scene=_text(self._get(row, "scene"), "scene"),
            arrays=arrays,
        )
        check(sample, whole=not self.first_frame)
        return sample

    @functools.cached_property
    def _target(self) -> "Layout":
        """How targets are read."""
        return dataclasses.replace(self, clip=dataclasses.replace(self.clip, frames=1)) if self.first_frame else self

    def _get(self, row: Mapping[str, Any], part: str, required: bool = False) -> Any:
        """The value of a part of a sample, None where it is absent."""
        names = (self.columns[part],) if part in self.columns else NAMES[part]
        medium = part in ("target", "source", "references")
        if part == "target" and len(same := [name for name in names if name in MEDIA and name in row]) > 1:
            raise MediaError(f"{' and '.join(same)} of one name: rename one of them, or say which in columns")
        if medium and any(name in row for name in names):  # a sidecar then only describes it
            names = tuple(name for name in names if name in row)
        for name in names:
            value = _find(row, name)
            if value is None and part not in self.columns and "json" in row:
                value = _find(row, f"json.{name}")
                if medium and self.open is None:  # in a sidecar a medium is a path, which only some layouts can open
                    value = None
            if value is not None:
                return value
        if required or part in self.columns:
            raise MediaError(f"missing key {names[0]!r} for the {part}; there are {', '.join(sorted(row)) or 'none'}")
        return None

    def _frames(self, value: Any, told: float | None, task: str) -> tuple[np.ndarray, float | None]:
        """Frames [t h w 3] of the clip and how many of them make a second; ``told`` is what the row says."""
        if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
            chosen = frame_indices(len(value), told, self.clip)
            frames = [self._picture(value[i]) for i in chosen]
            if len({frame.shape for frame in frames}) > 1:
                raise MediaError("the frames change their size")
            if len(frames) * frames[0].shape[0] * frames[0].shape[1] > self.limits.decoded_pixels:
                raise MediaError(f"{len(frames)} frames have more than {self.limits.decoded_pixels} pixels")
            return np.stack(frames), self._rate(told)
        if isinstance(value, np.ndarray):
            frames = _pixels(value)
            return fit_frames(frames[frame_indices(len(frames), told, self.clip)], self.clip.size), self._rate(told)
        data = self._bytes(value)
        if container_of(data) is not None:
            return decode_video(data, self.clip, self.limits)
        if task in VIDEO:
            return decode_animation(data, self.clip, self.limits)
        return self._picture(data)[None], None

    def _rate(self, told: float | None) -> float | None:
        return None if told is None else self.clip.fps or told

    def _picture(self, value: Any) -> np.ndarray:
        if isinstance(value, np.ndarray) and value.dtype != object:
            return fit_frames(_pixels(value)[:1], self.clip.size)[0]
        return fit_image(decode_image(self._bytes(value), self.limits), self.clip.size)

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, Mapping):  # an image of Hugging Face's datasets
            inside = value.get("bytes")
            value = value.get("path") if inside is None else inside
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, str) and self.open is not None:
            return self.open(value)
        raise MediaError(f"wanted the bytes of a picture or video, found {type(value).__name__}")


def place_of(file: str) -> tuple[str, str] | None:
    """The sample that a file belongs to and the column it fills there; None for files that are passed over.

    ``NAME.jpg`` is the column ``jpg`` of ``NAME``, which may hold dots. ``NAME.PART.jpg`` is the column ``PART`` where
    that is the name of a part of a sample: ``0001.source.png``, ``0001.reference2.jpg``. Hidden files, such as the
    ``._NAME.jpg`` that macOS adds, are passed over.
    """
    folder, _, base = file.rpartition("/")
    stem, _, extension = base.rpartition(".")
    if not stem or base.startswith("."):
        return None
    stem, column = (f"{folder}/{stem}" if folder else stem), extension.lower()
    head, _, part = stem.rpartition(".")
    numbered = _NUMBERED.fullmatch(part)
    if column in MEDIA and head and (numbered or part.lower() in _PART_NAMES):
        return head, f"references.{int(numbered[1]):04d}" if numbered else part.lower()
    return stem, column


def gathered(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose numbered references, each a column after ``place_of``, are one list in the order of their numbers."""
    numbered = sorted(name for name in row if name.startswith("references."))
    rest = {name: value for name, value in row.items() if name not in numbered}
    return rest | ({"references": [row[name] for name in numbered]} if numbered else {})


def check(sample: Sample, whole: bool = True) -> None:
    """Raises MediaError when a sample lacks what its task needs; ``whole`` False: its target is a first frame only."""
    if not sample.prompt.strip() and sample.task != "reconstruction":
        raise MediaError("an empty caption")
    if sample.task in SOURCED and sample.source is None:
        raise MediaError(f"no source, which {sample.task} needs")
    if whole and sample.task == "video_editing" and len(sample.source) != len(sample.target):
        raise MediaError(f"a source of {len(sample.source)} frames for a target of {len(sample.target)}")
    if sample.task == "reference_to_video" and not sample.references:
        raise MediaError("no reference pictures, which reference_to_video needs")
    if whole and sample.task in VIDEO and len(sample.target) < 2:
        raise MediaError(f"one frame, {sample.task} needs a video")


def _find(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    if not rest or head not in row:
        return None
    tree = row[head]
    if isinstance(tree, str | bytes):
        try:
            tree = json.loads(tree)
        except (ValueError, RecursionError) as error:
            raise MediaError(f"{head} is not valid JSON ({error})") from error
    for key in rest.split("."):
        if not isinstance(tree, Mapping):
            raise MediaError(f"{head} is a JSON {type(tree).__name__}, wanted an object")
        tree = tree.get(key)
        if tree is None:
            return None
    return tree


def _text(value: Any, part: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple | np.ndarray):
        value = value[0] if len(value) else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig")  # Windows' editors put a byte order mark first
    if not isinstance(value, str):
        raise MediaError(f"the {part} is of type {type(value).__name__}, expected text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise MediaError(f"the {part} holds half a surrogate pair, which is no character")
    return value.strip() if part == "prompt" else value


def _sequence(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple | np.ndarray) else (value,)


def _references(value: Any) -> Sequence[Any]:
    items = _sequence(value)
    if len(items) > MOST_REFERENCES:
        raise MediaError(f"{len(items)} references, at most {MOST_REFERENCES} are allowed")
    return items


def _rate(value: Any) -> float | None:
    if value is None or value == 0:
        return None
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not LEAST_FPS <= value <= MOST_FPS:
        raise MediaError(f"fps is {value!r}, expected a number in [{LEAST_FPS}, {MOST_FPS}]")
    return float(value)


def _pixels(value: np.ndarray) -> np.ndarray:
    frames = value[None] if value.ndim == 3 else value
    if value.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise MediaError(f"pixels of {value.dtype} {list(value.shape)}, wanted uint8 [height, width, 3]")
    return frames


def _arrays(value: Any) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(value) if value else {}
