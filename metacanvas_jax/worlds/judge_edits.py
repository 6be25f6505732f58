"""Judges edits of scenes: what was to change has changed, and everything else is where it was.

The judge of scenes finds the drawings; here they are compared with those of the source.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from metacanvas_jax.worlds.edits import Edit, same
from metacanvas_jax.worlds.judge import Detection, Judge, Verdict
from metacanvas_jax.worlds.requests import in_place
from metacanvas_jax.worlds.scenes import Item

_SLACK = 1 / 8  # of a cell: how far from its place a drawing may be found; drawings of the grid are further apart


def slack(judge: Judge) -> float:
    """Pixels that a drawing may be away from its place."""
    return judge.world.cell * _SLACK


def edit_verdict(judge: Judge, image: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"], edit: Edit) -> Verdict:
    """Whether a picture is what an edit asks for, and every reason why not.

    Every drawing that the edit does not name has kept its object, its colour and its place, and there is no other.
    What is added or moved may lie anywhere in the place that the words name. Of the drawings that are counted, as many
    as possible have stayed, and the new ones may lie anywhere. Raises ValueError as ``Judge.detect`` does.
    """
    found = judge.detect(image)
    reasons = _RULES.get(edit.kind, _exact)(judge, found, edit)
    return Verdict(not reasons, tuple(reasons), tuple(found))


def same_verdict(
    judge: Judge, image: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"], items: Iterable[Item]
) -> Verdict:
    """Whether a picture shows exactly these drawings in their places."""
    found = judge.detect(image)
    reasons = unlike(judge, found, items)
    return Verdict(not reasons, tuple(reasons), tuple(found))


def unlike(judge: Judge, found: Sequence[Detection], items: Iterable[Item]) -> list[str]:
    """Why what was found is not exactly these drawings in their places; empty where it is."""
    missing, surplus = compare(judge, found, items)
    return [*missing, *map(_unasked, surplus)]


def compare(judge: Judge, found: Sequence[Detection], items: Iterable[Item]) -> tuple[list[str], list[Detection]]:
    """Reasons for drawings that are not found in their place, and what was found beside all of them."""
    surplus, reasons = list(found), []
    for wanted in judge.drawn(items):
        there = next((one for one in surplus if _looks(one, wanted) and _near(judge, one, wanted)), None)
        if there is None:
            reasons.append(f"expected the {wanted.colour} {wanted.object} in its place")
        else:
            surplus.remove(there)
    return reasons, surplus


def _exact(judge: Judge, found: Sequence[Detection], edit: Edit) -> list[str]:
    """Of an edit whose result is known to the pixel."""
    return unlike(judge, found, edit.target)


def _placed(judge: Judge, found: Sequence[Detection], edit: Edit) -> list[str]:
    """Of something that is added to a place or moved there."""
    (new,) = edit.changed
    reasons, surplus = compare(judge, found, (item for item in edit.target if item != new))
    there = next((one for one in surplus if (one.object, one.colour) == (new.object, new.colour)), None)
    if there is None:
        reasons.append(f"expected a {new.colour} {new.object}")
    else:
        surplus.remove(there)
        if not in_place(edit.place, *there.centre, judge.world.size):
            reasons.append(f"expected the {new.colour} {new.object} {edit.place}")
    return [*reasons, *map(_unasked, surplus)]


def _counted(judge: Judge, found: Sequence[Detection], edit: Edit) -> list[str]:
    """Of a number of drawings that is changed."""
    one = next(
        item for item in (*edit.source, *edit.target) if _number(edit.source, item) != _number(edit.target, item)
    )
    wanted, before = _number(edit.target, one), [item for item in edit.source if same(item, one)]
    reasons, rest = compare(judge, found, (item for item in edit.source if not same(item, one)))
    group = [each for each in rest if (each.object, each.colour) == (one.object, one.colour)]
    reasons += map(_unasked, (each for each in rest if each not in group))
    if len(group) != wanted:
        return [*reasons, f"expected {wanted} {one.colour} {one.object}, found {len(group)}"]
    stayed = len(before) - len(compare(judge, group, before)[0])
    if stayed < min(wanted, len(before)):
        reasons.append(f"expected {min(wanted, len(before))} {one.colour} {one.object} to stay, {stayed} did")
    return reasons


_RULES = {"add": _placed, "move": _placed, "count": _counted}


def _number(items: Iterable[Item], one: Item) -> int:
    return sum(same(item, one) for item in items)


def _looks(found: Detection, wanted: Detection) -> bool:
    return (found.object, found.colour) == (wanted.object, wanted.colour)


def _near(judge: Judge, found: Detection, wanted: Detection) -> bool:
    return math.dist(found.centre, wanted.centre) <= slack(judge)


def _unasked(found: Detection) -> str:
    what = f"{found.colour} {found.object}" if found.object else "something unknown"
    return f"found {what} that nothing asks for"
