"""A deterministic detector for OpenMoji scenes, and GenEval's rules on what it finds.

Every drawing of the world is compared with every window of the picture. The error is the squared difference divided by
the energy of the drawing (its squared distance from white). A lower bound from block means skips only windows that
cannot pass.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from metacanvas_jax.worlds import openmoji
from metacanvas_jax.worlds.requests import in_place
from metacanvas_jax.worlds.scenes import Item, Scene, SceneWorld

_INK = 0.25  # a pixel this far from white in any channel is drawn on
_MIXED = 0.2  # how much nearer a quarter may lie to another colour, in mean squared distances between the two
_CANONICAL_CELL = 24  # larger drawings are judged at about this size


@dataclasses.dataclass(frozen=True)
class Detection:
    """One thing in a picture. ``object`` and ``colour`` are None for something that is no drawing of the world.

    ``box`` is (left, top, right, bottom) of its ink in pixels; ``error`` lies in [0, threshold), infinite if unknown.
    """

    object: str | None
    colour: str | None
    box: tuple[float, float, float, float]
    error: float

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a picture fulfils its metadata, and every reason why not."""

    correct: bool
    reasons: tuple[str, ...]
    detections: tuple[Detection, ...]


class Judge:
    """Detects the drawings of one world.

    Args:
      world: the scenes' world.
      threshold: the largest relative squared error that still counts as the drawing. The two most alike objects of
        one colour are 0.33 apart, so that half of one beside half of another is neither.
      strict: also ask that nothing else is in the picture.
    """

    def __init__(self, world: SceneWorld, threshold: float = 0.15, strict: bool = True) -> None:
        self.world, self.threshold, self.strict = world, threshold, strict
        common = math.gcd(world.size, world.cell)
        wanted = max(1, world.cell // _CANONICAL_CELL)
        self.factor = max(f for f in range(1, wanted + 1) if common % f == 0)
        self.cell = world.cell // self.factor
        self.block = max(f for f in range(1, max(2, self.cell // 6 + 1)) if self.cell % f == 0)
        self.smallest = max(4, self.cell**2 // 36)  # fragments of fewer pixels are ignored
        sprites = 1 - openmoji.sprites(world.objects, world.colours, world.sprite, world.cell)
        drawings = _reduce(sprites.reshape(-1, world.cell, world.cell, 3), self.factor)
        self.boxes = np.asarray([_box(drawing.max(-1) > _INK) for drawing in drawings])
        self.energy = np.square(drawings).sum((1, 2, 3))
        self.drawings = drawings
        self.coarse = _reduce(drawings, self.block).reshape(len(drawings), -1)
        # A window of less ink than this is too far from every drawing (triangle inequality on block means).
        slack = np.sqrt(threshold * self.energy) / self.block
        self.faintest = float((np.linalg.norm(self.coarse, axis=1) - slack).min())

    def detect(self, image: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"]) -> list[Detection]:
        """Everything in a picture (uint8, or float in [0, 1]), drawings of the world first, by increasing error.

        Raises ValueError for another shape or range.
        """
        ink = 1 - _reduce(self._checked(image)[None], self.factor)[0]
        taken = ink.max(-1) > _INK
        found = []
        for error, drawing, y, x in self._matches(ink):
            if all(max(abs(y - b), abs(x - a)) >= 0.75 * self.cell for _, _, b, a in found):
                found.append((error, drawing, y, x))
        found = [match for match in found if self._one_colour(ink, *match[1:])]
        for _, _, y, x in found:
            taken[y : y + self.cell, x : x + self.cell] = False
        detections = [self._detection(*match) for match in found]
        return detections + self._unknown(taken)

    def truth(self, scene: Scene) -> list[Detection]:
        """What is detected in a perfect picture of a scene."""
        return self.drawn(scene.items)

    def drawn(self, items: Iterable[Item]) -> list[Detection]:
        """What is detected in a perfect picture of some drawings, in their order."""
        found = []
        for item in items:
            drawing = self.world.objects.index(item.object) * len(self.world.colours)
            drawing += self.world.colours.index(item.colour)
            found.append(self._detection(0.0, drawing, item.y / self.factor, item.x / self.factor))
        return found

    def judge(self, image: np.ndarray, metadata: dict[str, Any]) -> bool:
        """Whether a picture fulfils GenEval metadata."""
        return self.verdict(image, metadata).correct

    def verdict(self, image: np.ndarray, metadata: dict[str, Any]) -> Verdict:
        """Detect and apply GenEval's rules, with reasons."""
        detections = self.detect(image)
        reasons = check(detections, metadata, self.world.size, self.strict)
        return Verdict(not reasons, tuple(reasons), tuple(detections))

    def verdicts(self, images: Sequence[np.ndarray] | np.ndarray, metadata: Sequence[dict[str, Any]]) -> list[Verdict]:
        """One verdict per picture."""
        return [self.verdict(image, entry) for image, entry in zip(images, metadata, strict=True)]

    def _checked(self, image: np.ndarray) -> np.ndarray:
        size = self.world.size
        if image.shape != (size, size, 3):
            raise ValueError(f"the judge of this world expects shape {(size, size, 3)}, got {image.shape}")
        if image.dtype == np.uint8:
            return image.astype(np.float32) / 255
        if not (np.issubdtype(image.dtype, np.floating) and np.all((image >= 0) & (image <= 1))):
            raise ValueError(f"the judge expects uint8 pictures or floats in [0, 1], got {image.dtype}")
        return image.astype(np.float32)

    def _matches(self, ink: np.ndarray) -> list[tuple[float, int, int, int]]:
        """(error, drawing, y, x) of every window within the thresholds, best first."""
        cell, block = self.cell, self.block
        views = np.lib.stride_tricks.sliding_window_view
        means = views(_box_mean(ink, block), (cell - block + 1,) * 2, (0, 1))[..., ::block, ::block]
        means = means.transpose(0, 1, 3, 4, 2)  # [y x rows columns 3] of every window
        norms = np.sqrt(np.square(means).sum((2, 3, 4)))
        ys, xs = np.where(norms > self.faintest)
        means = means[ys, xs].reshape(len(ys), self.coarse.shape[1])
        bound = np.square(norms[ys, xs])[:, None] - 2 * means @ self.coarse.T + np.square(self.coarse).sum(-1)
        window, drawing = np.where(bound * block**2 < self.threshold * self.energy)
        if not len(window):
            return []
        ys, xs, energy = ys[window], xs[window], self.energy[drawing]
        difference = views(ink, (cell, cell), (0, 1))[ys, xs].transpose(0, 2, 3, 1) - self.drawings[drawing]
        error = np.square(difference).sum((1, 2, 3)) / energy
        passed = error < self.threshold
        found = zip(error[passed], drawing[passed], ys[passed], xs[passed], strict=True)
        return sorted((float(e), int(d), int(y), int(x)) for e, d, y, x in found)

    def _one_colour(self, ink: np.ndarray, drawing: int, y: int, x: int) -> bool:
        """Whether no quarter of a match lies clearly closer to the same drawing in another colour.

        The lines make up most of a drawing's energy, so that its error alone would let two colours pass as one.
        """
        colours = len(self.world.colours)
        kind = self.drawings[drawing - drawing % colours :][:colours]
        window = ink[y : y + self.cell, x : x + self.cell]
        own, others = _quarters(window - self.drawings[drawing]), _quarters(window - kind)
        apart = _quarters(self.drawings[drawing] - kind).mean((1, 2), keepdims=True)
        return bool(np.all(own - others <= _MIXED * apart))

    def _detection(self, error: float, drawing: int, y: float, x: float) -> Detection:
        kind, colour = divmod(drawing, len(self.world.colours))
        box = self._scaled(self.boxes[drawing] + (x, y, x, y))
        return Detection(self.world.objects[kind], self.world.colours[colour], box, error)

    def _unknown(self, taken: np.ndarray) -> list[Detection]:
        """Every connected patch of ink that belongs to no detected drawing."""
        from scipy import ndimage  # of the [miniature] extra, as the drawings are

        labels = np.zeros(taken.shape, np.int32)
        ndimage.label(taken, np.ones((3, 3)), output=labels)
        large = [label for label, size in enumerate(np.bincount(labels.ravel())) if label and size >= self.smallest]
        return [Detection(None, None, self._scaled(_box(labels == label)), math.inf) for label in large]

    def _scaled(self, box: np.ndarray) -> tuple[float, float, float, float]:
        left, top, right, bottom = (float(edge) * self.factor for edge in box)
        return left, top, right, bottom


def relations(a: Detection, b: Detection, slack: float = 0.1) -> set[str]:
    """Which relations a has to b (geneval, evaluation/evaluate_images.py, relative_position)."""
    sides_a = np.subtract(a.box[2:], a.box[:2])
    sides_b = np.subtract(b.box[2:], b.box[:2])
    offset = np.subtract(a.centre, b.centre)
    beyond = np.maximum(np.abs(offset) - slack * (sides_a + sides_b), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def check(detections: Sequence[Detection], metadata: dict[str, Any], size: float, strict: bool = True) -> list[str]:
    """Every reason why detections fail the metadata, by GenEval's rules; none when they fulfil it.

    ``include`` asks for at least ``count`` of a class, in a colour, in a relation to an earlier clause's objects, or
    (this project's addition) in a place; ``exclude`` forbids ``count`` of a class. ``strict`` also forbids whatever the
    included classes do not account for.
    """
    reasons: list[str] = []
    by_class: dict[str | None, list[Detection]] = {}
    for detection in detections:
        by_class.setdefault(detection.object, []).append(detection)
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = by_class.get(name, [])[:count]
        failures = []
        if len(found) < count:
            failures.append(f"expected {count} {name}, found {len(found)}")
        elif "color" in clause and any(one.colour != clause["color"] for one in found):
            seen = ", ".join(str(one.colour) for one in found)
            failures.append(f"expected {clause['color']} {name}, found {seen}")
        elif "place" in clause and not all(in_place(clause["place"], *one.centre, size) for one in found):
            failures.append(f"expected {name} {clause['place']}")
        elif "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            if others is None:
                failures.append(f"no target for {name} {relation}")
            elif any(relation not in relations(one, other) for one in found for other in others):
                failures.append(f"expected {name} {relation} target")
        groups.append(None if failures else found)
        reasons += failures
    for clause in metadata.get("exclude", ()):
        if len(by_class.get(clause["class"], [])) >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}")
    if strict:
        wanted = {clause["class"]: clause["count"] for clause in metadata.get("include", ())}
        for name, group in by_class.items():
            if len(group) > wanted.get(name, 0):
                reasons.append(f"found {len(group)} {name or 'unknown'}, expected {wanted.get(name, 0)}")
    return reasons


def _reduce(images: np.ndarray, factor: int) -> np.ndarray:
    """Means over ``factor x factor`` blocks of ``[n h w c]``."""
    n, height, width, channels = images.shape
    if factor == 1:
        return images
    blocks = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return blocks.mean((2, 4))


def _quarters(difference: np.ndarray) -> np.ndarray:
    """Squared sums over the quarters of ``[... h w c]``, as ``[... 2 2]``."""
    middle = (0, difference.shape[-2] // 2)
    return np.add.reduceat(np.add.reduceat(np.square(difference).sum(-1), middle, -2), middle, -1)


def _box_mean(image: np.ndarray, block: int) -> np.ndarray:
    """The mean of every ``block x block`` window of ``[h w c]``."""
    sums = np.pad(image.astype(np.float64), ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    total = sums[block:, block:] - sums[:-block, block:] - sums[block:, :-block] + sums[:-block, :-block]
    return (total / block**2).astype(np.float32)


def _box(mask: np.ndarray) -> np.ndarray:
    """(left, top, right, bottom) of what is true."""
    rows, columns = np.where(mask)
    return np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
