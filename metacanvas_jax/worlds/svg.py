"""What an SVG drawing may hold before it is given to a renderer: parts of itself only, and a bounded number of them."""

import re
from collections.abc import Iterator
from typing import Any
from xml.parsers import expat

DEEPEST = 64  # elements inside each other
MOST = 100_000  # elements that are drawn, those behind references counted every time

_URL = re.compile(r"url\(\s*['\"]?\s*([^'\")\s]*)", re.IGNORECASE)


def check(svg: str) -> None:
    """Raises ValueError for a drawing that names a file, declares entities, nests too deep or repeats parts too often.

    A renderer would read a named file from the disk, and would follow references without bound.
    """
    open_elements: list[str] = []  # of each the nearest id
    inside: dict[str, list[str]] = {"": []}  # id of an element -> what it draws: "" for an element, or another id

    def started(name: str, attributes: dict[str, str]) -> None:
        if len(open_elements) == DEEPEST:
            raise ValueError(f"elements of the drawing are nested deeper than {DEEPEST}")
        around, own = open_elements[-1] if open_elements else "", attributes.get("id", "")
        if own:
            inside[around].append(own)
        inside.setdefault(own or around, []).extend(["", *_references(attributes)])
        open_elements.append(own or around)

    def entity(name: str, *_: Any) -> None:
        raise ValueError(f"the drawing declares the entity {name!r}")

    def text(data: str) -> None:
        _check_names(_URL.findall(data))
        if "@import" in data:
            raise ValueError("the drawing imports a style sheet")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = started
    parser.EndElementHandler = lambda name: open_elements.pop()
    parser.EntityDeclHandler = entity
    parser.CharacterDataHandler = text
    try:
        parser.Parse(svg, True)
    except (expat.ExpatError, UnicodeEncodeError) as error:
        raise ValueError(f"no SVG drawing ({error})") from error
    _count("", inside, {}, ())


def _references(attributes: dict[str, str]) -> Iterator[str]:
    """The ids that an element refers to. Raises ValueError for a reference to anything outside of the drawing."""
    for key, value in attributes.items():
        names = _URL.findall(value)
        if key.rpartition(":")[2].lower() in ("href", "src"):
            names.append(value.strip())
        _check_names(names)
        yield from (name[1:] for name in names)


def _check_names(names: list[str]) -> None:
    for name in names:
        if not name.startswith("#"):
            raise ValueError(f"the drawing names {name[:60]!r}, expected parts of the drawing itself")


def _count(own: str, inside: dict[str, list[str]], known: dict[str, int], above: tuple[str, ...]) -> int:
    """Elements that are drawn for one id."""
    if own in above or len(above) > DEEPEST:
        raise ValueError(f"the part {own!r} of the drawing refers to itself, or through more than {DEEPEST} others")
    if own not in known:
        parts = inside.get(own, [])
        total = sum(1 if part == "" else _count(part, inside, known, (*above, own)) for part in parts)
        if total > MOST:
            raise ValueError(f"the drawing repeats its parts more than {MOST} times")
        known[own] = total
    return known[own]
