"""Line charts as inline SVG that take their colours from the page's style sheet."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Line = tuple[Sequence[float], Sequence[float]]
"""(x, y) of the points; points that are not finite are left out."""

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 16, 46
_POINTS = 400  # a line of more points is thinned to this many means
SERIES = 6  # colours that the style sheet names


@dataclass(frozen=True)
class Chart:
    """One chart: named lines on common axes.

    With ``smooth`` each line is drawn faintly and its running mean over about a twentieth of it strongly. With ``log``
    the y axis is logarithmic and values that are not positive are left out. ``level`` draws a dashed line across, e.g.
    a score to reach; ``y_range`` fixes the y axis (powers of ten if ``log``). Without ``y_label`` the title names
    the values. Raises ValueError for lines of unequal x and y and for more than six lines.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    smooth: bool = False
    log: bool = False
    level: float | None = None
    y_range: tuple[float, float] | None = None

    def __post_init__(self):
        if len(self.lines) > SERIES:
            raise ValueError(f"chart {self.title!r} has {len(self.lines)} lines; at most {SERIES} can be distinguished")
        for name, (x, y) in self.lines.items():
            if len(x) != len(y):
                raise ValueError(f"chart {self.title!r}: line {name!r} has {len(x)} x values and {len(y)} y values")


def line_chart(chart: Chart) -> str:
    """The chart as an ``<svg>`` element, or a sentence if there is nothing to draw."""
    lines = {name: _points(*line, chart.log) for name, line in chart.lines.items()}
    drawn = np.concatenate([points for points in lines.values() if len(points)] or [np.zeros((0, 2))])
    if not len(drawn):
        return '<p class="none">No values were logged.</p>'
    x_low, x_high = _widened(drawn[:, 0].min(), drawn[:, 0].max())
    y_low, y_high = _y_limits(chart, drawn[:, 1])

    def place(points: np.ndarray) -> np.ndarray:
        x = _LEFT + (points[:, 0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (y_high - points[:, 1]) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return np.stack([x, np.clip(y, _TOP, _HEIGHT - _BOTTOM)], axis=1)

    parts = [_axes(chart, (x_low, x_high), (y_low, y_high), place)]
    if chart.level is not None:
        level = math.log10(chart.level) if chart.log else chart.level
        parts.append(f'<path class="level" d="{_path(place(np.array([[x_low, level], [x_high, level]])))}"/>')
    for i, points in enumerate(lines.values()):
        if not len(points):
            continue
        if chart.smooth and len(points) > 4:
            parts.append(f'<path class="line faint s{i}" d="{_path(place(_thinned(points)))}"/>')
            points = _running_mean(points)
        parts.append(f'<path class="line s{i}" d="{_path(place(_thinned(points)))}"/>')
        if len(points) <= 24:
            parts += [f'<circle class="dot s{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in place(points)]
    title = html.escape(f"{chart.title}: {chart.y_label or 'value'} over {chart.x_label}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def legend(chart: Chart) -> str:
    """Names of the lines beside their colours; nothing for a single line."""
    if len(chart.lines) < 2:
        return ""
    items = (f'<span class="key s{i}">{html.escape(name)}</span>' for i, name in enumerate(chart.lines))
    return f'<p class="legend">{"".join(items)}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _points(x: Sequence[float], y: Sequence[float], log: bool) -> np.ndarray:
    points = np.array([x, y], np.float64).T.reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if log:
        points = points[points[:, 1] > 0]
        points[:, 1] = np.log10(points[:, 1])
    return points[np.argsort(points[:, 0], kind="stable")]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_limits(chart: Chart, values: np.ndarray) -> tuple[float, float]:
    if chart.y_range is not None:
        return chart.y_range
    if chart.level is not None:
        values = np.append(values, math.log10(chart.level) if chart.log else chart.level)
    low, high = values.min(), values.max()
    if chart.smooth and len(values) > 50:
        # A single spike must not press everything else to the floor.
        high = min(high, np.percentile(values, 99) * 1.5) if not chart.log else high
    low, high = _widened(low, high)
    room = 0.06 * (high - low)
    floor = 0.0 if not chart.log and 0 <= low < 0.4 * high else low - room
    return floor, high + room


def _thinned(points: np.ndarray) -> np.ndarray:
    if len(points) <= _POINTS:
        return points
    return np.stack([part.mean(axis=0) for part in np.array_split(points, _POINTS)])


def _running_mean(points: np.ndarray) -> np.ndarray:
    half = max(1, len(points) // 40)
    total = np.concatenate([np.zeros((1, 2)), np.cumsum(points, axis=0)])
    index = np.arange(len(points))
    reach = np.minimum(half, np.minimum(index, len(points) - 1 - index))  # symmetric, so that the ends do not lag
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)[:, None]


def _path(points: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _axes(chart: Chart, x_limits: tuple[float, float], y_limits: tuple[float, float], place) -> str:
    parts = []
    for value in ticks(*x_limits):
        x, _ = place(np.array([[value, y_limits[0]]]))[0]
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
        )
    y_ticks = _decades(*y_limits) if chart.log else [(value, _label(value)) for value in ticks(*y_limits)]
    for value, label in y_ticks:
        _, y = place(np.array([[x_limits[0], value]]))[0]
        parts.append(f'<path class="rule" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(chart.x_label)}</text>'
    )
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    if chart.y_label:
        parts.append(
            f'<text class="axis" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(chart.y_label)}</text>"
        )
    return "".join(parts)


def _label(value: float) -> str:
    """A number of at most seven letters, which fit beside the axis."""
    return text if len(text := f"{value:g}") <= 7 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks of a logarithmic axis; ``low`` and ``high`` are powers of ten already."""
    values = [10.0**e * m for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    found = [value for value in values if low <= math.log10(value) <= high]
    if len(found) < 3:  # less than a decade
        found = [value for value in ticks(10.0**low, 10.0**high) if value > 0]
    return [(math.log10(value), _label(value)) for value in found]
