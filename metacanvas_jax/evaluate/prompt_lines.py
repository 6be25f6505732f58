"""The prompts of a file: one a line, as text or as JSON objects with what a task needs beside its words."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.paint.requests import Request

KEYS = ("prompt", "seed", "name", "image", "video", "references", "edit", "size", "frames", "fps")
RESERVED = ("sheet",)


@dataclasses.dataclass(frozen=True)
class Line:
    """One prompt of a file.

    ``name`` is that of its results, without an ending. ``noise`` decides the noise of its results: lines of the same
    noise differ in what they ask for alone. ``where`` is the line, for errors.
    """

    name: str
    request: Request
    noise: str
    where: str

    def row(self) -> dict[str, Any]:
        """What was asked for, as values for JSON."""
        asked = {"noise": self.noise}
        for field in dataclasses.fields(self.request):
            value = getattr(self.request, field.name)
            if isinstance(value, tuple) and field.name == "references":
                value = [str(one) for one in value]
            if value not in (None, False, []):
                asked[field.name] = value if isinstance(value, str | int | float | tuple | list) else str(value)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}


def read(path: Path, shared: Request) -> list[Line]:
    """The lines of a text file or, of a ``.jsonl`` file, its objects; what they do not say is taken from ``shared``.

    Their media are relative to the file. Raises UserError that names the line for what is no prompt.
    """
    if path.suffix.lower() != ".jsonl":
        text = files.read_text(path).splitlines()
        rows = [(number, {"prompt": line.strip()}) for number, line in enumerate(text, 1) if line.strip()]
    else:
        rows = base.numbered_json_lines(path)
    if not rows:
        raise UserError(f"{path}: no prompts there")
    return _lines([(f"{path}, line {number}", f"{number:05d}", row) for number, row in rows], path.parent, shared)


def given(prompts: Sequence[str], shared: Request, **media: Any) -> list[Line]:
    """The same for prompts of a command line; ``media`` are fields of all of their requests."""
    rows = [(f"--prompt {prompt!r}", f"{number:05d}", {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]
    lines = _lines(rows, Path(), shared)
    return [dataclasses.replace(line, request=dataclasses.replace(line.request, **media)) for line in lines]


def _lines(rows: Sequence[tuple[str, str, Mapping[str, Any]]], folder: Path, shared: Request) -> list[Line]:
    lines: list[Line] = []
    places: dict[str, str] = {}
    times: dict[str, int] = {}
    for where, number, row in rows:
        if unknown := [key for key in row if key not in KEYS]:
            raise UserError(f"{where}: the key {unknown[0]!r} is unknown, expected {', '.join(KEYS)}")
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise UserError(f"{where}: 'prompt' is {prompt!r}, expected a text")
        name = base.file_name(base.text_of({"name": number, **row}, "name", where), where)
        if name in places or name in RESERVED:
            raise UserError(f"{where}: the name {name!r} is also that of {places.get(name, 'the contact sheet')}")
        places[name] = where
        times[prompt] = times.get(prompt, 0) + 1
        seed = _number(row, "seed", where, (int,), 0, (1 << 64) - 1)
        noise = f"prompt {times[prompt]} {prompt}" if seed is None else f"seed {seed}"
        lines.append(Line(name, _request(row, prompt, where, folder, shared), noise, where))
    return lines


def _request(row: Mapping[str, Any], prompt: str, where: str, folder: Path, shared: Request) -> Request:
    """A line's request. Raises UserError for values of another kind, and for media that are not there."""
    media = {key: _medium(row[key], key, where, folder) for key in ("image", "video") if row.get(key) is not None}
    references = row.get("references", [])
    if not isinstance(references, list):
        raise UserError(f"{where}: 'references' is {references!r}, expected a list of files")
    size, edit = row.get("size"), row.get("edit", False)
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        raise UserError(f"{where}: 'size' is {size!r}, expected [rows, columns] in pixels")
    if not isinstance(edit, bool):
        raise UserError(f"{where}: 'edit' is {edit!r}, expected true or false")
    return Request(
        prompt,
        **media,
        references=tuple(_medium(one, "references", where, folder) for one in references),
        edit=edit,
        size=shared.size if size is None else (size[0], size[1]),
        frames=_number(row, "frames", where, (int,), 1, 1 << 20) or shared.frames,
        fps=_number(row, "fps", where, (int, float), 0.01, 1000) or shared.fps,
    )


def _medium(name: Any, key: str, where: str, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: {key!r} is {name!r}, expected the name of a file")
    path = files.folder(files.join(folder, name))
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
    return path


def _number(row: Mapping[str, Any], key: str, where: str, kinds: tuple, least: float, most: float) -> Any:
    value = row.get(key)
    if value is not None and (type(value) not in kinds or not least <= value <= most):
        raise UserError(f"{where}: {key!r} is {value!r}, expected a number from {least} to {most}")
    return value
