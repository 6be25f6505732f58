"""Emoji as npm packages ship them: drawings of one thing in several styles, and animated clips.

`npm install --ignore-scripts` puts the packages into a folder (docs/data.md names them). The drawings are Iconify sets,
whose licences differ; nothing of them is copied into this repository.
"""

import dataclasses
import functools
import itertools
import pathlib
import re

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax import files
from metacanvas_jax.data.decoding import decode_animation, decode_image, read_medium
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout, check
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.transforms import fit_image
from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import svg
from metacanvas_jax.worlds.openmoji import package

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
"""Code point of a skin tone to its name."""

_TONED = re.compile(r"(?P<base>.+?)-(?P<tone>medium-light|medium-dark|light|medium|dark)(-skin-tone)?")
_LARGEST_SET = 1 << 28  # bytes of an icons.json


@dataclasses.dataclass(frozen=True)
class Icon:
    """One drawing: the set it belongs to, its name and skin tone ("" for none), and the inside of its SVG."""

    style: str
    name: str
    tone: str
    body: str
    width: float
    height: float

    @property
    def caption(self) -> str:
        """ "waving hand, dark skin tone"."""
        return self.name.replace("-", " ") + (f", {self.tone} skin tone" if self.tone else "")

    def render(self, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
        """The drawing on white; 128 x 128 pixels where no size is wanted."""
        side = max(size or (128, 128))
        drawing = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}">{self.body}</svg>'
        svg.check(drawing)
        png = package("resvg_py").svg_to_bytes(svg_string=drawing, width=side, height=side, skip_system_fonts=True)
        return fit_image(decode_image(bytes(png)), size)


class Styles(Guarded):
    """Iconify sets below a folder: every drawing with its caption, or every edit between two drawings of one thing.

    Edits change the style (to each other set that has the thing) or the skin tone (to each other one of the set).
    Raises UserError when there are no sets or one cannot be read.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, max_skips: int = 0, in_memory: bool = False) -> None:
        super().__init__(max_skips, in_memory)
        self.path, self.layout = path, layout
        found = [path / name for name in files.listing(path, deep=True)]
        sets = [file for file in found if file.name == "icons.json" and file.parent.parent.name == "@iconify-json"]
        self._icons = [icon for file in sets for icon in _icons(file)]
        self._edits = _edits(self._icons) if layout.task == "image_editing" else []

    def __len__(self) -> int:
        return len(self._edits if self.layout.task == "image_editing" else self._icons)

    def __repr__(self) -> str:
        return f"Styles({str(self.path)!r})"

    def name(self, index: int) -> str:
        """Set and name of the drawing or drawings."""
        icons = self._edits[index] if self.layout.task == "image_editing" else (self._icons[index],)
        return " to ".join(f"{icon.style}/{icon.caption}" for icon in icons)

    def read(self, index: int) -> Sample:
        """The drawing, or the edit, with this number."""
        size, task = self.layout.clip.size, self.layout.task or "text_to_image"
        if task != "image_editing":
            icon = self._icons[index]
            prompt = f"{icon.caption}, in the style of {icon.style}"
            return Sample(prompt, icon.render(size)[None], task, name=self.name(index))
        before, after = self._edits[index]
        restyled = before.style != after.style
        prompt = f"redraw it in the style of {after.style}" if restyled else f"change the skin tone to {after.tone}"
        return Sample(prompt, after.render(size)[None], task, before.render(size)[None], name=self.name(index))


class Clips(Guarded):
    """Animated WebP files named by code points (``1f44b-1f3ff.webp``) below a folder, captioned by their CLDR names.

    Video edits change the skin tone. The reference of a reference-to-video sample is the first frame. Raises UserError
    when the `emoji` package is missing.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, max_skips: int = 0, in_memory: bool = False) -> None:
        super().__init__(max_skips, in_memory)
        self.path, self.layout = path, layout
        names = package("emoji").EMOJI_DATA
        self._captions: dict[pathlib.Path, str] = {}
        for name in files.listing(path, deep=True):
            file = path / name
            entry = names.get(_characters(file.stem)) if file.suffix == ".webp" else None
            if entry and _is_animated(file):
                self._captions[file] = entry["en"].strip(":").replace("_", " ").lower()
        clips = list(self._captions)
        self._clips = _toned_clips(clips) if layout.task == "video_editing" else [(file,) for file in clips]

    def __len__(self) -> int:
        return len(self._clips)

    def __repr__(self) -> str:
        return f"Clips({str(self.path)!r})"

    def name(self, index: int) -> str:
        """The file, or the two files."""
        return " to ".join(str(file.relative_to(self.path)) for file in self._clips[index])

    def read(self, index: int) -> Sample:
        """The clip, or the edit, with this number."""
        task = self.layout.task or "text_to_video"
        *before, file = self._clips[index]
        target, fps = self._frames(file)
        prompt, source, references = f"{self._captions[file]}, in motion", None, ()
        if before:
            source, _ = self._frames(before[0])
            prompt = f"change the skin tone to {TONES[file.stem[-5:]]}"
        elif task == "reference_to_video":
            references = (target[0],)
        sample = Sample(prompt, target, task, source, references, fps, name=self.name(index))
        check(sample, whole=not self.layout.first_frame)
        return sample

    def _frames(self, file: pathlib.Path) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
        limits = self.layout.limits
        return decode_animation(read_medium(file, file.name, limits), self.layout.clip, limits)


@functools.lru_cache(maxsize=8)
def _icons(file: pathlib.Path) -> tuple[Icon, ...]:
    """The visible drawings of a set."""
    try:
        tree = files.read_json(file, limit=_LARGEST_SET)
        title = files.read_json(file.parent / "info.json")["name"]
        icons = {key: icon for key, icon in tree["icons"].items() if not icon.get("hidden")}
        width, height = tree.get("width", 16), tree.get("height", 16)  # 16: Iconify's own default
        found = []
        for key, icon in icons.items():
            toned = _TONED.fullmatch(key)
            name, tone = (toned["base"], toned["tone"]) if toned and toned["base"] in icons else (key, "")
            found.append(Icon(title, name, tone, icon["body"], icon.get("width", width), icon.get("height", height)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: no Iconify set ({type(error).__name__}: {error})") from error
    return tuple(found)


def _edits(icons: list[Icon]) -> list[tuple[Icon, Icon]]:
    """Ordered pairs of drawings that differ in style alone, and in skin tone alone."""
    things: dict[tuple[str, str], list[Icon]] = {}
    people: dict[tuple[str, str], list[Icon]] = {}
    for icon in icons:
        things.setdefault((icon.name, icon.tone), []).append(icon)
        if not _TONED.fullmatch(icon.name):  # a couple, whose first figure has a tone in the name
            people.setdefault((icon.style, icon.name), []).append(icon)
    pairs = [pair for group in things.values() for pair in itertools.permutations(group, 2)]
    # From a figure without a tone to one with it, never back: no word asks for "no tone".
    return pairs + [pair for group in people.values() for pair in itertools.permutations(group, 2) if pair[1].tone]


def _characters(stem: str) -> str:
    """The emoji that a file is named after, "" where it is no emoji's name."""
    try:
        return "".join(chr(int(code, 16)) for code in stem.split("-"))
    except (ValueError, OverflowError):
        return ""


def _is_animated(file: pathlib.Path) -> bool:
    """The flag in the extended header of a WebP file."""
    head = files.read_range(file, 0, 21)
    return head[:4] == b"RIFF" and head[12:16] == b"VP8X" and len(head) == 21 and bool(head[20] & 2)


def _toned_clips(files: list[pathlib.Path]) -> list[tuple[pathlib.Path, ...]]:
    """Ordered pairs of clips of one figure that end in different skin tones."""
    figures: dict[str, list[pathlib.Path]] = {}
    for file in files:
        base, _, code = file.stem.rpartition("-")
        if code in TONES and not any(other in base for other in TONES):
            figures.setdefault(base, []).append(file)
    return [pair for group in figures.values() for pair in itertools.permutations(group, 2)]
