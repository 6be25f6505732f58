"""Sections of a page that several reports share: pictures under headings, and tables."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from metacanvas_jax.report.pictures import Picture, data_uri


@dataclass(frozen=True)
class Section:
    """A part of a page: its anchor, its title, and its body, which is HTML."""

    name: str
    title: str
    body: str


@dataclass(frozen=True)
class Sheet:
    """A wide picture, such as a preview of a training, and what it shows."""

    title: str
    picture: Picture


@dataclass(frozen=True)
class Table:
    """A table of plain texts; all columns but the first are numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(shown: Sequence[Sheet]) -> str:
    """Every picture under its title, at its own size or the width of the page."""
    return "".join(
        f'<h3>{html.escape(one.title)}</h3><div class="card"><img style="max-width:100%;height:auto" '
        f'src="{data_uri(one.picture)}" alt="{html.escape(one.title, quote=True)}"></div>'
        for one in shown
    )


def tables(shown: Sequence[Table]) -> str:
    """Every table under its title."""
    parts = []
    for one in shown:
        head = "".join(
            f"<th{' class=number' if place else ''}>{html.escape(text)}</th>" for place, text in enumerate(one.heads)
        )
        body = "".join(
            f'<tr><th scope="row">{html.escape(first)}</th>'
            + "".join(f'<td class="number">{html.escape(text)}</td>' for text in rest)
            + "</tr>"
            for first, *rest in one.rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        parts.append(f'<h3>{html.escape(one.title)}</h3><div class="scroll">{table}</div>')
    return "".join(parts)
