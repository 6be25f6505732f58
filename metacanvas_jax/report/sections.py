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
    """A table of plain texts; all columns but the first are numbers. Lines of ``note`` stand below it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def sheets(shown: Sequence[Sheet]) -> str:
    """Every picture under its title, at its own size or the width of the page; as many beside each other as fit."""
    cards = "".join(
        f'<div class="card"><h3>{html.escape(one.title)}</h3><img style="max-width:100%;height:auto" '
        f'src="{data_uri(one.picture)}" alt="{html.escape(one.title, quote=True)}"></div>'
        for one in shown
    )
    return f'<div class="sheets">{cards}</div>' if cards else ""


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
        notes = "".join(f'<p class="soft">{html.escape(line)}</p>' for line in one.note.splitlines())
        title = f"<h3>{html.escape(one.title)}</h3>" if one.title else ""
        parts.append(f'{title}<div class="scroll">{table}</div>{notes}')
    return "".join(parts)


def listed(pairs: Sequence[tuple[str, str]]) -> str:
    """A table of names and texts that may be long; nothing for none."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>' for name, text in pairs
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>' if rows else ""
