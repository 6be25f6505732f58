"""HTML pages that need no other file: the document around a body, and tables."""

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
small { opacity: .75; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A page with a title above its body (HTML); ``style`` is CSS beside that of all pages."""
    name = html.escape(title)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{name}</h1>{body}</html>\n'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
