"""Judges videos of animated scenes: the right drawings in every frame, and the motions that the words tell."""

import math

import numpy as np
from jaxtyping import Float, UInt8

from metacanvas_jax.worlds.animations import MOTIONS, Animation
from metacanvas_jax.worlds.judge import Detection, Judge, Verdict
from metacanvas_jax.worlds.judge_edits import slack, unlike

Frames = UInt8[np.ndarray, "t h w 3"] | Float[np.ndarray, "t h w 3"]
Path = Float[np.ndarray, "t 2"]
"""Where a drawing is in every frame: x and y in pixels."""

LEAST_FRAMES = 5  # with fewer, a circle is no more than two turns back
_KEPT = 0.07  # root mean square difference of a first frame that is kept, of 1; noise of 0.08 on white is 0.06
_TURN = 0.75  # of a full turn that a circle takes at least


def told_verdict(judge: Judge, frames: Frames, animation: Animation) -> Verdict:
    """Whether a video shows what words tell: its drawings, none else, in every frame, and how each of them moves.

    For text-to-video, and for reference-to-video, whose pictures say what the drawings look like. Raises ValueError for
    fewer than ``LEAST_FRAMES`` frames, and as ``Judge.detect`` does.
    """
    found = _detected(judge, frames)
    return _verdict(_told(judge, found, animation), found)


def continued_verdict(judge: Judge, frames: Frames, animation: Animation, first: UInt8[np.ndarray, "h w 3"]) -> Verdict:
    """Whether a video begins with a given picture and goes on as words tell: image-to-video."""
    found = _detected(judge, frames)
    begins = [f"first frame: {reason}" for reason in unlike(judge, found[0], animation.items(0.0))]
    apart = math.sqrt(np.mean(np.square(_unit(frames[0]) - _unit(first))))
    if apart > _KEPT:
        begins.append(f"the first frame differs from the given picture by {apart:.2f}, at most {_KEPT} is allowed")
    return _verdict([*begins, *_told(judge, found, animation)], found)


def edited_verdict(judge: Judge, frames: Frames, target: Animation) -> Verdict:
    """Whether every frame shows exactly the drawings of the edited video in their places: video editing.

    An edit leaves the motions as they are, so that every drawing has a known place at every moment.
    """
    found = _detected(judge, frames)
    last = len(found) - 1
    reasons = [
        f"frame {number}: {reason}"
        for number, detections in enumerate(found)
        for reason in unlike(judge, detections, target.items(number / last))
    ]
    return _verdict(reasons, found)


def motion_reasons(judge: Judge, path: Path, motion: str) -> list[str]:
    """Why a path is not the motion that its words say; empty where it is."""
    direction = MOTIONS[motion]
    if direction is None:
        return _circle_reasons(judge, path)
    near = slack(judge)
    if not any(direction):
        return [] if _extent(path) <= near else [f"moved by {_extent(path):.0f} pixels"]
    along = path @ np.asarray(direction, float)
    across = path @ np.asarray(direction[::-1], float)
    steps = np.diff(along)
    total, least = along[-1] - along[0], _least(judge)
    reasons = []
    if total < least - near:
        reasons.append(f"went {total:.0f} pixels in its direction, expected at least {least}")
    if steps.min() < -near / 2:
        reasons.append(f"went back by {-steps.min():.0f} pixels")
    if np.ptp(across) > near:
        reasons.append(f"left its line by {np.ptp(across):.0f} pixels")
    if steps.max() > 2 * max(total, 0.0) / len(steps) + near:
        reasons.append(f"jumped by {steps.max():.0f} pixels")
    return reasons


def _told(judge: Judge, found: list[list[Detection]], animation: Animation) -> list[str]:
    reasons, paths = [], {mover: [] for mover in animation.movers}
    for number, detections in enumerate(found):
        rest = list(detections)
        for mover in animation.movers:
            there = next((one for one in rest if (one.object, one.colour) == (mover.object, mover.colour)), None)
            if there is None:
                reasons.append(f"frame {number}: expected a {mover.colour} {mover.object}")
            else:
                rest.remove(there)
                paths[mover].append(there.centre)
        reasons += [f"frame {number}: found {one.colour or ''} {one.object or 'something unknown'}" for one in rest]
    if reasons:
        return reasons  # without a drawing in every frame there is no path
    return [
        f"{mover.colour} {mover.object}, {mover.motion}: {reason}"
        for mover, path in paths.items()
        for reason in motion_reasons(judge, np.asarray(path), mover.motion)
    ]


def _circle_reasons(judge: Judge, path: Path) -> list[str]:
    near = slack(judge)
    middle, radius = _circle(path)
    least = (judge.world.size - judge.world.cell) // 4
    if not least - near <= radius <= judge.world.size:
        return [f"went around with a radius of {radius:.0f} pixels, expected at least {least}"]
    offsets = path - middle
    reasons = []
    if (off := np.abs(np.linalg.norm(offsets, axis=1) - radius).max()) > near:
        reasons.append(f"left its circle by {off:.0f} pixels")
    turns = np.diff(np.unwrap(np.arctan2(offsets[:, 1], offsets[:, 0]))) / (2 * math.pi)
    if abs(turns.sum()) < _TURN:
        reasons.append(f"went around {abs(turns.sum()):.2f} times, expected once")
    if (turns * np.sign(turns.sum())).min() < -near / (2 * math.pi * radius):
        reasons.append("turned back")
    return reasons


def _circle(path: Path) -> tuple[Float[np.ndarray, "2"], float]:
    """Middle and radius of the circle nearest to a path, by least squares on ``x^2 + y^2`` (Kasa 1976)."""
    matrix = np.column_stack([2 * path, np.ones(len(path))])
    (x, y, rest), *_ = np.linalg.lstsq(matrix, np.square(path).sum(1), rcond=None)
    return np.asarray([x, y]), math.sqrt(max(rest + x * x + y * y, 0.0))


def _least(judge: Judge) -> int:
    """The shortest way, in pixels, that an animation of this world moves a drawing."""
    world = judge.world
    return world.step * max(1, (world.size - world.cell) // (2 * world.step))


def _extent(path: Path) -> float:
    return float(np.linalg.norm(path - path[0], axis=1).max())


def _unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)


def _detected(judge: Judge, frames: Frames) -> list[list[Detection]]:
    if len(frames) < LEAST_FRAMES:
        raise ValueError(f"motions are judged in at least {LEAST_FRAMES} frames, got {len(frames)}")
    return [judge.detect(frame) for frame in frames]


def _verdict(reasons: list[str], found: list[list[Detection]]) -> Verdict:
    """With the detections of the last frame."""
    return Verdict(not reasons, tuple(reasons), tuple(found[-1]))
