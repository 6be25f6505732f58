"""The report of a run: one HTML file that opens offline, with pictures and charts inside it."""

import base64
import html
import importlib.resources
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.report.charts import Chart, legend, line_chart
from metacanvas_jax.report.pictures import Picture, data_uri
from metacanvas_jax.report.sections import Section

_NARROW = "\N{NARROW NO-BREAK SPACE}"  # between a number and its unit


@dataclass(frozen=True)
class Fact:
    """One figure of the headline, e.g. ("Held-out prompts", "41 %", "of 160 pictures")."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ScoreRow:
    """One category: the share of right pictures in each column ("seen", "held-out", "shuffled"), None where not scored.

    ``counts`` are the pictures behind each share, for its standard error. ``bars`` are the shares to reach, ``limits``
    the shares not to exceed; ``total`` sets the row apart. Raises ValueError for a share outside [0, 1].
    """

    name: str
    shares: Mapping[str, float | None]
    counts: Mapping[str, int] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    total: bool = False

    def __post_init__(self):
        for column, share in self.shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"score {self.name!r} in column {column!r} is {share}; expected a share in [0, 1]")


@dataclass(frozen=True)
class Sample:
    """A prompt and its picture.

    ``right`` is the judge's verdict (None without one), ``note`` its reason, ``maps`` one canvas map per keyframe, or
    pictures that ``labels`` name, ``beside`` further pictures with their captions.
    Pictures are bytes ``[h w 3]`` at their own size; the page enlarges them.
    """

    prompt: str
    picture: Picture
    right: bool | None = None
    held_out: bool = False
    category: str = ""
    note: str = ""
    maps: Sequence[Picture] = ()
    labels: Sequence[str] = ()
    beside: Sequence[tuple[str, Picture]] = ()


@dataclass(frozen=True)
class Answer:
    """One question to the MLLM, with the picture it was shown (None for a question about words)."""

    question: str
    given: str
    expected: str
    picture: Picture | None = None

    @property
    def right(self) -> bool:
        """Whether the answer is right to the letter."""
        return self.given == self.expected


@dataclass(frozen=True)
class Understanding:
    """What the MLLM understands: (share of right answers, questions) by kind of question, and example answers."""

    accuracy: Mapping[str, tuple[float, int]]
    examples: Sequence[Answer] = ()
    summary: str = ""


@dataclass(frozen=True)
class Film:
    """A moving picture (the bytes of a GIF), and what it shows."""

    gif: bytes
    note: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page; sections without content are left out. Texts are plain: the page escapes them."""

    title: str
    summary: str
    facts: Sequence[Fact] = ()
    film: Film | None = None
    lead: Sequence[Sample] = ()
    lead_note: str = ""
    scores: Sequence[ScoreRow] = ()
    scores_note: str = ""
    charts: Sequence[Chart] = ()
    pictures: Sequence[Sample] = ()
    pictures_note: str = ""
    canvas: Sequence[Sample] = ()
    canvas_note: str = (
        "Principal components of what the canvas connector adds to the tokens, half-way through sampling."
    )
    mllm: Understanding | None = None
    sections: Sequence[Section] = ()  # between those of this page and the setup
    timings: Sequence[tuple[str, float, str]] = ()  # part, seconds, note
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    footer: str = "Made by metacanvas_jax."


def write_report(path: str | os.PathLike, data: ReportData) -> Path:
    """Writes the page, complete or not at all, and returns its path. Raises UserError when it cannot."""
    path = files.folder(path)
    files.write(path, render(data))
    return path


def render(data: ReportData) -> str:
    """The page as a string."""
    sections = [
        ("film", "From noise to pictures", _film(data.film)),
        ("lead", "Prompts with a layout", _canvas(data.lead, data.lead_note)),
        ("scores", "Scores", _scores(data.scores, data.scores_note)),
        ("training", "Training", _charts(data.charts)),
        ("pictures", "Pictures", _pictures(data.pictures, data.pictures_note)),
        ("canvas", "Canvas maps", _canvas(data.canvas, data.canvas_note)),
        ("mllm", "What the MLLM understands", _mllm(data.mllm)),
        *((one.name, one.title, one.body) for one in data.sections),
        ("timings", "Timings", _timings(data.timings)),
        ("setup", "Setup", _setup(data.config, data.versions)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    template = importlib.resources.files("metacanvas_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        title=_text(data.title),
        summary=_text(data.summary),
        facts=_facts(data.facts),
        contents=f"<nav>{links}</nav>" if links else "",
        sections="\n".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections),
        footer=_text(data.footer),
    )


def percent(share: float) -> str:
    """A share in per cent; one decimal below 10 % where it is not whole."""
    value = 100 * share
    whole = value >= 10 or abs(value - round(value)) < 0.05
    return f"{value:.0f}{_NARROW}%" if whole else f"{value:.1f}{_NARROW}%"


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.42 s, 48 s, 2 min 05 s, 3 h 20 min."""
    if seconds < 10:
        text = f"{seconds:.2g} s"
    elif (whole := round(seconds)) < 60:
        text = f"{whole} s"
    elif whole < 3600:
        text = f"{whole // 60} min {whole % 60:02d} s"
    else:
        text = f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return text.replace(" ", _NARROW)


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _name(name: str) -> str:
    """A category as people write it: GenEval says color_attr."""
    return _text(name.replace("_", " "))


def _image(picture: Picture, alt: str) -> str:
    height, width = picture.shape[:2]
    return f'<img src="{data_uri(picture)}" width="{width}" height="{height}" alt="{_text(alt)}">'


def _mark(right: bool | None) -> str:
    """The verdict in a sign, a word and a colour, so that none of them is needed to read it."""
    if right is None:
        return ""
    return '<span class="mark good">✓ right</span>' if right else '<span class="mark bad">✗ wrong</span>'


def _note(text: str) -> str:
    return f'<p class="soft">{_text(text)}</p>' if text else ""


def _facts(facts: Sequence[Fact]) -> str:
    if not facts:
        return ""
    items = (
        f"<div><dt>{_text(fact.label)}</dt><dd>{_text(fact.value)}<small>{_text(fact.note)}</small></dd></div>"
        for fact in facts
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _meter(share: float, threshold: float | None = None) -> str:
    tick = "" if threshold is None else f'<b style="left:{100 * threshold:.1f}%"></b>'
    return f'<div class="meter"><i style="width:{100 * share:.1f}%"></i>{tick}</div>'


def _scores(rows: Sequence[ScoreRow], note: str) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row.shares))
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        f'<tr{" class=total" if row.total else ""}><th scope="row">{_name(row.name)}</th>'
        + "".join(f"<td>{_score(row, column)}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    table = (
        f'<div class="scroll"><table><thead><tr><th>Category</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    counted = any(row.counts for row in rows)
    asked = any(row.bars or row.limits for row in rows)
    key = "Share of pictures that the judge finds right."
    key += " ± is one standard error." if counted else ""
    key += " The upright tick is the bar to reach (≥) or not to exceed (≤)." if asked else ""
    return f"{_note(note)}{table}{_note(key)}"


def _score(row: ScoreRow, column: str) -> str:
    share = row.shares.get(column)
    if share is None:
        return '<span class="soft">–</span>'
    error = ""
    if count := row.counts.get(column):
        error = 100 * (share * (1 - share) / count) ** 0.5
        error = f'<small>± {error:.{error < 1:d}f}<span class="n">, n = {count}</span></small>'
    verdict, threshold = "", None
    if column in row.bars:
        threshold, reached = row.bars[column], share >= row.bars[column]
        verdict = _bar("≥", threshold, reached)
    elif column in row.limits:
        threshold, reached = row.limits[column], share <= row.limits[column]
        verdict = _bar("≤", threshold, reached)
    return f'<div class="value">{percent(share)} {error}{verdict}</div>{_meter(share, threshold)}'


def _bar(sign: str, threshold: float, reached: bool) -> str:
    kind, check = ("good", "✓") if reached else ("bad", "✗")
    return f'<small class="{kind}">{check} {sign} {percent(threshold)}</small>'


def _charts(charts: Sequence[Chart]) -> str:
    cards = (f'<div class="card"><h3>{_text(c.title)}</h3>{line_chart(c)}{legend(c)}</div>' for c in charts)
    return f'<div class="charts">{"".join(cards)}</div>' if charts else ""


def _figure(sample: Sample) -> str:
    kind = {True: ' class="right"', False: ' class="wrong"', None: ""}[sample.right]
    new = '<span class="mark new">held out</span>' if sample.held_out else ""
    marks = f"<div>{_mark(sample.right)}{new}</div>" if sample.right is not None or new else ""
    note = f"<small>{_text(sample.note)}</small>" if sample.note else ""
    caption = f"<figcaption>{marks}{_text(sample.prompt)}{note}</figcaption>"
    return f"<figure{kind}>{_image(sample.picture, sample.prompt)}{caption}</figure>"


def _pictures(samples: Sequence[Sample], note: str) -> str:
    if not samples:
        return ""
    parts = [_note(note)]
    for category in dict.fromkeys(sample.category for sample in samples):
        members = [sample for sample in samples if sample.category == category]
        judged = [sample.right for sample in members if sample.right is not None]
        count = f' <span class="soft">{sum(judged)} of {len(judged)} right</span>' if judged else ""
        title = f"<h3>{_name(category)}{count}</h3>" if category else ""
        parts.append(f'{title}<div class="sheet">{"".join(map(_figure, members))}</div>')
    return "".join(parts)


def _film(film: Film | None) -> str:
    if film is None:
        return ""
    source = "data:image/gif;base64," + base64.b64encode(film.gif).decode("ascii")
    return f'{_note(film.note)}<img style="max-width:100%;height:auto" src="{source}" alt="{_text(film.note)}">'


def _canvas(samples: Sequence[Sample], note: str) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        keyframes = ["canvas"] if len(sample.maps) == 1 else [f"keyframe {i + 1}" for i in range(len(sample.maps))]
        maps = "".join(
            f"<figure>{_image(one, f'{label}: {sample.prompt}')}<figcaption>{_text(label)}</figcaption></figure>"
            for one, label in zip(sample.maps, sample.labels or keyframes, strict=True)
        )
        picture = f"<figure>{_image(sample.picture, sample.prompt)}<figcaption>picture</figcaption></figure>"
        beside = "".join(
            f"<figure>{_image(one, f'{caption}: {sample.prompt}')}<figcaption>{_text(caption)}</figcaption></figure>"
            for caption, one in sample.beside
        )
        new = '<span class="mark new">held out</span>' if sample.held_out else ""
        cards.append(
            f'<div class="card"><p>{_mark(sample.right)} {new} {_text(sample.prompt)}</p>'
            f'<div class="row">{picture}{maps}{beside}</div></div>'
        )
    return f'{_note(note)}<div class="maps">{"".join(cards)}</div>'


def _mllm(mllm: Understanding | None) -> str:
    if mllm is None:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_text(kind)}</th><td class="number">{percent(share)}</td><td>{_meter(share)}</td>'
        f'<td class="number soft">{count}</td></tr>'
        for kind, (share, count) in mllm.accuracy.items()
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>Question</th><th class="number">Right</th><th></th>'
        f'<th class="number">Asked</th></tr></thead><tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )
    items = "".join(f'<li class="card">{_answer(example)}</li>' for example in mllm.examples)
    examples = f'<h3>Answers</h3><ul class="qa">{items}</ul>' if items else ""
    return _note(mllm.summary) + table + examples


def _answer(one: Answer) -> str:
    picture = _image(one.picture, one.question) if one.picture is not None else ""
    expected = "" if one.right else f'<p class="soft">expected: {_text(one.expected)}</p>'
    lines = f'<p class="soft">{_text(one.question)}</p><p>{_text(one.given)} {_mark(one.right)}</p>{expected}'
    return f"{picture}<div>{lines}</div>"


def _timings(timings: Sequence[tuple[str, float, str]]) -> str:
    if not timings:
        return ""
    longest = max(seconds for _, seconds, _ in timings) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{_text(part)}</th><td class="number">{duration(seconds)}</td>'
        f'<td>{_meter(seconds / longest)}</td><td class="soft">{_text(note)}</td></tr>'
        for part, seconds, note in timings
    )
    total = duration(sum(seconds for _, seconds, _ in timings))
    rows += f'<tr class="total"><th scope="row">Total</th><td class="number">{total}</td><td></td><td></td></tr>'
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _setup(config: str, versions: Mapping[str, str]) -> str:
    parts = []
    if config:
        parts.append(f"<details><summary>Resolved config</summary><pre>{_text(config)}</pre></details>")
    if versions:
        text = "\n".join(f"{name:<24} {version}" for name, version in versions.items())
        parts.append(f"<details><summary>Versions and machine</summary><pre>{_text(text)}</pre></details>")
    return "".join(parts)
