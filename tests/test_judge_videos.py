"""The judge of videos: right on what was asked, also with noise, and not fooled by near misses."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.worlds import animations
from metacanvas_jax.worlds.animations import CIRCLE, STILL, Animation, Mover
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.judge_videos import continued_verdict, edited_verdict, told_verdict
from metacanvas_jax.worlds.scenes import Item, SceneWorld, draw_items

pytestmark = pytest.mark.miniature

WORLD = SceneWorld()
TINY = experiment(load_config("configs/video_stage3.py:miniature", [])).world
FRAMES = 7

RIGHT = Mover("cat", "red", "moving to the right", 0, 0, 36, 0)
CAR = Mover("car", "blue", STILL, 12, 36, 12, 36)
ROUND = Mover("cat", "red", CIRCLE, 18, 6, 18, 30)
BOTH = Animation((RIGHT, CAR))


def video(*paths, count=FRAMES):
    """Frames of drawings: each is an object, a colour, and a function of the time from 0 to 1 that places it."""
    moments = [i / (count - 1) for i in range(count)]
    placed = [
        [Item(name, colour, *map(round, spot)) for name, colour, where in paths if (spot := where(moment)) is not None]
        for moment in moments
    ]
    return np.stack([draw_items(WORLD, items) for items in placed])


def still(t):
    return 12, 36


def right(t):
    return 36 * t, 0


def turning(turns, radius=12.0, way=1):
    return lambda t: (
        18 + radius * math.sin(way * 2 * math.pi * turns * t),
        18 - radius * math.cos(2 * math.pi * turns * t),
    )


CAT_RIGHT, CAR_STILL = ("cat", "red", right), ("car", "blue", still)
TOLD = {
    "as drawn": (BOTH, (CAT_RIGHT, CAR_STILL)),
    "lower, and not all the way": (BOTH, (("cat", "red", lambda t: (6 + 24 * t, 3)), CAR_STILL)),
    "the car in another place": (BOTH, (CAT_RIGHT, ("car", "blue", lambda t: (30, 30)))),
    "slower at the end": (BOTH, (("cat", "red", lambda t: (36 * math.sin(t * math.pi / 2), 0)), CAR_STILL)),
    "a circle": (Animation((ROUND,)), (("cat", "red", turning(1)),)),
    "a circle the other way": (Animation((ROUND,)), (("cat", "red", turning(1, way=-1)),)),
}
NOT_TOLD = {
    "moves to the left": (BOTH, (("cat", "red", lambda t: (36 - 36 * t, 0)), CAR_STILL)),
    "moves down": (Animation((RIGHT,)), (("cat", "red", lambda t: (0, 36 * t)),)),
    "moves aslant": (Animation((RIGHT,)), (("cat", "red", lambda t: (36 * t, 18 * t)),)),
    "stands still": (BOTH, (("cat", "red", lambda t: (0, 0)), CAR_STILL)),
    "hardly moves": (BOTH, (("cat", "red", lambda t: (6 * t, 0)), CAR_STILL)),
    "goes and comes back": (BOTH, (("cat", "red", lambda t: (36 * math.sin(math.pi * t), 0)), CAR_STILL)),
    "jumps": (BOTH, (("cat", "red", lambda t: (36 * (t > 0.5), 0)), CAR_STILL)),
    "trembles": (BOTH, (("cat", "red", lambda t: (24 * t + 9 * (round(6 * t) % 2), 0)), CAR_STILL)),
    "the other one moves": (BOTH, (("cat", "red", lambda t: (0, 0)), ("car", "blue", lambda t: (36 * t, 36)))),
    "both move": (BOTH, (CAT_RIGHT, ("car", "blue", lambda t: (36 * t, 36)))),
    "another colour": (BOTH, (("cat", "green", right), CAR_STILL)),
    "another object": (BOTH, (("duck", "red", right), CAR_STILL)),
    "another colour in the last frame": (
        BOTH,
        (
            ("cat", "red", lambda t: right(t) if t < 1 else None),
            ("cat", "green", lambda t: right(t) if t == 1 else None),
            CAR_STILL,
        ),
    ),
    "gone in one frame": (BOTH, (("cat", "red", lambda t: None if t == 0.5 else right(t)), CAR_STILL)),
    "one is missing": (BOTH, (CAT_RIGHT,)),
    "one more": (Animation((RIGHT,)), (CAT_RIGHT, CAR_STILL)),
    "one more at the end": (Animation((RIGHT,)), (CAT_RIGHT, ("car", "blue", lambda t: still(t) if t == 1 else None))),
    "twice": (Animation((RIGHT,)), (CAT_RIGHT, ("cat", "red", lambda t: (36 * t, 30)))),
    "half a circle": (Animation((ROUND,)), (("cat", "red", turning(0.5)),)),
    "a tiny circle": (Animation((ROUND,)), (("cat", "red", turning(1, radius=3)),)),
    "a line for a circle": (Animation((ROUND,)), (("cat", "red", right),)),
    "to and fro for a circle": (Animation((ROUND,)), (("cat", "red", lambda t: (18 - 18 * math.cos(6.28 * t), 18)),)),
    "a circle for a line": (Animation((RIGHT,)), (("cat", "red", turning(1)),)),
}


@functools.cache
def judge(world=WORLD):
    return Judge(world)


def spoilt(frames, sigma, rng):
    return np.clip(frames / 255 + rng.normal(0, sigma, frames.shape), 0, 1)


@pytest.mark.parametrize(("world", "sigma"), [(WORLD, 0.0), (TINY, 0.05), (TINY, 0.08)])
def test_true_videos_are_right(world, sigma):
    rng, wrong = np.random.default_rng(0), []
    for i in range(14):
        made = Animation.from_json(animations.animation(world, 7, i).to_json())
        frames = animations.frames(world, made, 5)
        verdict = continued_verdict(judge(world), spoilt(frames, sigma, rng), made, frames[0])
        wrong += [] if verdict.correct else [(made.prompt, verdict.reasons)]
        edited, words = animations.edited(world, made, 7, i)
        verdict = edited_verdict(judge(world), spoilt(animations.frames(world, edited, 5), sigma, rng), edited)
        wrong += [] if verdict.correct else [(words, verdict.reasons)]
    assert not wrong


@pytest.mark.parametrize("case", TOLD)
def test_any_video_that_the_words_allow_is_right(case):
    made, paths = TOLD[case]
    assert told_verdict(judge(), video(*paths), made).reasons == ()


@pytest.mark.parametrize("case", NOT_TOLD)
def test_near_misses_are_refused(case):
    made, paths = NOT_TOLD[case]
    verdict = told_verdict(judge(), video(*paths), made)
    assert not verdict.correct and verdict.reasons


def test_every_drawing_of_a_long_or_a_short_video_is_followed():
    for count in (5, 17):
        made, paths = TOLD["a circle"]
        assert told_verdict(judge(), video(*paths, count=count), made).correct
    with pytest.raises(ValueError, match="at least 5 frames, got 4"):
        told_verdict(judge(), video(*paths, count=4), made)


def test_image_to_video_keeps_the_first_frame():
    frames = video(CAT_RIGHT, CAR_STILL)
    first = frames[0]

    def reasons(frames, first=first):
        return continued_verdict(judge(), frames, BOTH, first).reasons

    assert reasons(frames) == ()
    lower = video(("cat", "red", lambda t: (36 * t, 6)), CAR_STILL)  # as told, but it does not begin with the picture
    assert told_verdict(judge(), lower, BOTH).correct
    assert "first frame: expected the red cat in its place" in reasons(lower)
    later = video(("cat", "red", lambda t: (12 + 24 * t, 0)), CAR_STILL)
    assert any("first frame" in reason for reason in reasons(later))
    shifted = frames.copy()
    shifted[0] = np.roll(shifted[0], 2, axis=1)  # its drawings are where they were, to the eye
    assert len(reasons(shifted)) == 1 and "differs from the given picture" in reasons(shifted)[0]
    standing = np.stack([first] * FRAMES)
    assert any("expected at least" in reason for reason in reasons(standing))


def test_video_editing_keeps_the_motions():
    recoloured = Animation((dataclasses.replace(RIGHT, colour="green"), CAR))
    green = ("cat", "green", right)

    def correct(target, *paths):
        return edited_verdict(judge(), video(*paths), target).correct

    assert correct(recoloured, green, CAR_STILL)
    assert not correct(recoloured, CAT_RIGHT, CAR_STILL), "nothing was edited"
    assert not correct(recoloured, ("cat", "yellow", right), CAR_STILL)
    assert not correct(recoloured, ("cat", "green", lambda t: (0, 0)), CAR_STILL), "the motion is lost"
    assert not correct(recoloured, ("cat", "green", lambda t: (36 - 36 * t, 0)), CAR_STILL)
    assert not correct(recoloured, ("cat", "green", lambda t: (36 * t, 6)), CAR_STILL)
    assert not correct(recoloured, green, ("car", "green", still)), "the other one, too"
    assert not correct(recoloured, green), "the other one is gone"
    assert correct(Animation((RIGHT,)), CAT_RIGHT)
    assert not correct(Animation((RIGHT,)), CAT_RIGHT, CAR_STILL), "what was to be removed is there"
    assert not correct(Animation((RIGHT,)), CAT_RIGHT, ("car", "blue", lambda t: still(t) if t == 1 else None))
