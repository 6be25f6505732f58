"""Edits and animations: what is drawn is what was asked for, the same for everybody, and nothing held out."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import animations, edits
from metacanvas_jax.worlds.animations import MOTIONS, Mover
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.requests import PLACES, in_place
from metacanvas_jax.worlds.scenes import Item, SceneWorld, draw_items, is_held_pair

pytestmark = pytest.mark.miniature
WORLD = SceneWorld()


@pytest.fixture(scope="module")
def judge():
    return Judge(WORLD)


def _made(count=40, seed=5):
    return [edits.edit(WORLD, seed, index) for index in range(count)]


def _counts(items):
    return collections.Counter((item.object, item.colour) for item in items)


def test_source_of_edits_judges_target_right_and_source_wrong(judge):
    kinds = collections.Counter()
    for made in _made(25):
        kinds[made.kind] += 1
        metadata = made.metadata
        target, source = draw_items(WORLD, made.target), draw_items(WORLD, made.source)
        assert judge.judge(target, metadata), (made.instruction, judge.verdict(target, metadata).reasons)
        assert not judge.judge(source, metadata), made.instruction
    assert set(kinds) == set(edits.KINDS) and set(kinds.values()) == {5}


def test_source_of_edits_changes_what_the_instruction_names_and_nothing_else():
    for made in _made():
        before, after = set(made.source), set(made.target)
        words = made.instruction.split()
        kept = before & after
        if made.kind == "recolour":
            assert len(before) == len(after) and _counts(made.target)[made.changed[0].object, words[-1]] >= 1
            assert {(i.x, i.y) for i in before} == {(i.x, i.y) for i in after}
            assert len({(i.object, i.colour) for i in before - after}) == 1
        elif made.kind == "add":
            (new,) = after - before
            assert kept == before and new.colour in words and new.object in words
        elif made.kind == "remove":
            assert kept == after and len({(i.object, i.colour) for i in before - after}) == 1
            assert not _counts(before - after).keys() & _counts(after).keys()
        elif made.kind == "move":
            (old,), (new,) = before - after, after - before
            assert dataclasses.replace(old, x=new.x, y=new.y) == new
        else:
            changed = {key for key in _counts(before) | _counts(after) if _counts(before)[key] != _counts(after)[key]}
            assert len(changed) == 1
        if made.place is not None:
            (new,) = after - before
            assert in_place(made.place, new.x + WORLD.cell / 2, new.y + WORLD.cell / 2, WORLD.size)
            assert made.place in PLACES and made.place.split()[-1] in words


def test_source_of_edits_and_animations_never_shows_what_is_held_out():
    shown = [item for made in _made() for item in (*made.source, *made.target)]
    for index in range(30):
        made = animations.animation(WORLD, 5, index)
        shown += [item for time in (0.0, 0.5, 1.0) for item in made.items(time)]
        shown += animations.edited(WORLD, made, 5, index)[0].items(0.0)
    assert not [item for item in shown if is_held_pair(WORLD, item.object, item.colour)]


def test_source_of_drawings_is_a_function_of_world_seed_and_number():
    for kind, task in (("edits", "image_editing"), ("animations", "video_editing"), ("scenes", "reconstruction")):
        section = SourceSection(kind=kind, task=task, count=20, seed=3)
        clip = Clip(frames=5) if kind == "animations" else Clip()
        first, again = (open_source(section, clip, WORLD) for _ in range(2))
        other = open_source(dataclasses.replace(section, seed=4), clip, WORLD)
        for index in (7, 0):
            a, b = first[index], again[index]
            assert (a.prompt, a.scene, a.task) == (b.prompt, b.scene, task)
            np.testing.assert_array_equal(a.target, b.target)
            assert a.scene != other[index].scene
            assert json.loads(a.metadata)["prompt"] and a.name == f"{kind} 3/{index}"
    with pytest.raises(UserError, match="needs a world"):
        open_source(section)


def test_source_of_animations_moves_as_it_says():
    seen = collections.Counter()
    for index in range(60):
        made = animations.animation(WORLD, 1, index)
        for mover in made.movers:
            seen[mover.motion] += 1
            start, end = mover.at(0.0), mover.at(1.0)
            direction = MOTIONS[mover.motion]
            if direction is None:
                assert (start.x, start.y) == (end.x, end.y)
                half = mover.at(0.5)
                assert half.y - start.y >= (WORLD.size - WORLD.cell) // 2 - 2 and abs(half.x - start.x) <= 1
                assert mover.at(0.25).x > start.x  # clockwise from the top
            else:
                assert np.sign(end.x - start.x) == direction[0] and np.sign(end.y - start.y) == direction[1]
            for step in range(9):
                item = mover.at(step / 8)
                assert 0 <= item.x <= WORLD.size - WORLD.cell and 0 <= item.y <= WORLD.size - WORLD.cell
            assert f"{mover.colour} {mover.object} {mover.motion}" in made.prompt
        for step in range(9):
            if len(made.movers) == 2:
                a, b = made.items(step / 8)
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= WORLD.cell
        assert any(mover.motion != "standing still" for mover in made.movers)
    assert set(seen) == set(MOTIONS)


def test_source_of_animations_serves_every_video_task(judge):
    clip = Clip(frames=5, fps=10.0)
    samples = {
        task: open_source(SourceSection(kind="animations", task=task, count=9, seed=2), clip, WORLD)[4]
        for task in ("text_to_video", "image_to_video", "video_editing", "reference_to_video")
    }
    plain, edit = samples["text_to_video"], samples["video_editing"]
    for task, sample in samples.items():
        assert sample.task == task and sample.target.shape == (5, 60, 60, 3) and sample.fps == 10.0
    np.testing.assert_array_equal(samples["image_to_video"].target, plain.target)
    np.testing.assert_array_equal(edit.source, plain.target)
    assert not np.array_equal(edit.source, edit.target)
    truth = json.loads(edit.metadata)["include"]
    for frame in edit.target[[0, 4]]:
        wanted = {"tag": "x", "include": [{k: v for k, v in c.items() if k != "motion"} for c in truth]}
        assert judge.judge(frame, wanted)
    shown = samples["reference_to_video"]
    colours = [mover["colour"] for mover in json.loads(shown.scene)["movers"]]
    assert len(shown.references) == len(colours) and not any(colour in shown.prompt for colour in colours)
    found = [judge.detect(picture)[0].colour for picture in shown.references]
    assert found == colours


def test_source_of_animations_is_the_same_motion_for_any_number_of_frames():
    mover = Mover("cat", "green", "moving to the right", 0, 6, 32, 6)
    assert [mover.at(i / 4).x for i in range(5)] == [0, 8, 16, 24, 32]
    made = animations.Animation((mover,))
    np.testing.assert_array_equal(animations.frames(WORLD, made, 5)[[0, 2, 4]], animations.frames(WORLD, made, 3))
    np.testing.assert_array_equal(
        animations.frames(WORLD, made, 3)[1], draw_items(WORLD, [Item("cat", "green", 16, 6)])
    )
