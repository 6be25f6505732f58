"""Sizes of latents, canvases and pictures: rules that training, drawing and the PyTorch side share, in plain Python."""

import math
from collections.abc import Iterable
from fractions import Fraction


def latent_grid(size: tuple[int, int], frames: int, *, spatial: int, temporal: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of the latents of ``frames`` frames of ``size`` pixels.

    A latent stands for ``spatial`` x ``spatial`` pixels. The first frame has latents of its own, then each ``temporal``
    frames together.
    """
    return (frames - 1) // temporal + 1, size[0] // spatial, size[1] // spatial


def canvas_grid(
    table: tuple[int, int, int], latents: tuple[int, int, int], latents_per_cell: int | None
) -> tuple[int, int, int]:
    """(keyframes, rows, columns) of the canvas for latents of (frames, rows, columns).

    There are as many keyframes as ``table`` has, but not more than frames of latents. With ``latents_per_cell`` n a
    cell of the canvas covers n x n latents: rows and columns are the nearest whole numbers, halves rounded up, and at
    least 1. With None they are those of ``table``, whatever the latents are.
    """
    frames, *sides = latents
    if latents_per_cell is None:
        rows, columns = table[1:]
    else:
        rows, columns = (max(1, (side + latents_per_cell // 2) // latents_per_cell) for side in sides)
    return min(table[0], frames), rows, columns


def fitting_size(sides: tuple[float, float], area: int, unit: int) -> tuple[int, int]:
    """(rows, columns) in multiples of ``unit``, with about this area in pixels, of the aspect ratio of ``sides``."""
    scale = math.sqrt(area / (sides[0] * sides[1])) / unit
    rows, columns = (max(1, round(side * scale)) * unit for side in sides)
    return rows, columns


def nearest_size(sides: tuple[int, int], sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, columns) of ``sizes`` whose aspect ratio is nearest to that of ``sides``, on a logarithmic scale.

    Of equally near ones it is the one nearest in area, again on a logarithmic scale, and then the one with fewer rows.
    The comparison is one of fractions: it is exact, and does not depend on the machine or on the order of ``sizes``.
    """

    def apart(a: int, b: int) -> Fraction:
        return Fraction(max(a, b), min(a, b))

    def distance(size: tuple[int, int]) -> tuple[Fraction, Fraction, tuple[int, int]]:
        ratio = apart(size[0] * sides[1], size[1] * sides[0])
        return ratio, apart(math.prod(size), math.prod(sides)), size

    return min(sizes, key=distance)
