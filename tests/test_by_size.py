"""Sources that are sorted by size: what each bucket reads, how often it is drawn, and what a run refuses."""

import dataclasses
import json
import shutil

import pytest
from by_size_support import LONG, SQUARE, TALL, TASK, WIDE, edits, run, sort

from metacanvas_jax.config.check import check
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import by_size, inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.held_out import held_out
from metacanvas_jax.launch import own_data
from metacanvas_jax.train.agreement import check_same
from metacanvas_jax.train.job import fed_shapes, fingerprint, fit_config, make_job
from metacanvas_jax.train.store import describe

FEW = {(30, 30): (1, SQUARE), (20, 40): (3, WIDE)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``out``: 8 square samples, 6 wide and 4 tall; ``few``: 1 square sample and 3 wide ones; a tokenizer."""
    place = tmp_path_factory.mktemp("by_size")
    edits(place / "rows")
    edits(place / "few_rows", pictures=FEW)
    sort(place / "rows", place / "out")
    sort(place / "few_rows", place / "few")
    return place


@pytest.fixture(scope="module")
def setup(place):
    return run(place / "out", place / "tokenizer")


def shares(setup):
    """The share of the steps of every size."""
    drawn = by_size.buckets(setup)
    return {bucket.size: bucket.weight / sum(one.weight for one in drawn) for bucket in drawn}


def test_a_size_is_drawn_as_often_as_it_has_samples(setup):
    assert shares(setup) == pytest.approx({SQUARE: 8 / 18, WIDE: 6 / 18, TALL: 4 / 18, LONG: 0})
    assert sum(bucket.weight for bucket in by_size.buckets(setup)) == pytest.approx(4)
    batches = {SQUARE: 4, WIDE: 2, TALL: 8, LONG: 2}
    uneven = tuple(dataclasses.replace(one, batch=batches[one.size]) for one in setup.buckets)
    expected = {SQUARE: 2 / 5.5, WIDE: 3 / 5.5, TALL: 0.5 / 5.5, LONG: 0}
    assert shares(dataclasses.replace(setup, buckets=uneven)) == pytest.approx(expected)
    doubled = tuple(dataclasses.replace(one, weight=1 + (one.size == TALL)) for one in setup.buckets)
    assert shares(dataclasses.replace(setup, buckets=doubled))[TALL] == pytest.approx(8 / 22)


def test_other_tasks_keep_their_share_of_the_steps(setup):
    other = dataclasses.replace(setup.buckets[0], task="text_to_image", weight=6.0)
    source = SourceSection("scenes", task="text_to_image", count=8)
    both = dataclasses.replace(setup, buckets=(other, *setup.buckets), sources=(source, *setup.sources))
    assert by_size.buckets(both)[0] == both.shapes[0]
    assert sum(bucket.weight for bucket in by_size.buckets(both)[1:]) == pytest.approx(4)


def test_sources_keep_their_shares_over_all_sizes(place, setup):
    second = dataclasses.replace(setup.sources[0], path=str(place / "few"), weight=0.1)
    both = dataclasses.replace(setup, sources=(dataclasses.replace(setup.sources[0], weight=0.9), second))
    expected = {
        SQUARE: (0.9 * 8 / 18, 0.1 * 1 / 4),
        WIDE: (0.9 * 6 / 18, 0.1 * 3 / 4),
        TALL: (0.9 * 4 / 18,),
    }
    found = {one.bucket.size: tuple(source.weight for source in one.sources) for one in inputs.opened(both)}
    assert found.keys() == expected.keys()
    for size, weights in expected.items():
        assert found[size] == pytest.approx(weights)
        assert shares(both)[size] == pytest.approx(sum(weights))


def test_without_by_size_nothing_is_read_and_nothing_changes(setup):
    plain = dataclasses.replace(setup, sources=(SourceSection("records", "nowhere", TASK),))
    assert by_size.buckets(plain) == plain.shapes and by_size.looked_at(plain) == list(plain.shapes)
    assert by_size.identity(plain) == {} and by_size.said(plain) == []
    assert "by_size" not in identity(plain)["sources"][0]
    assert by_size.at(plain, plain.shapes[0]) == list(plain.sources)


def test_sizes_without_samples_and_samples_without_bucket_are_named(place, setup, caplog):
    assert [(one.bucket.size, one.count) for one in inputs.opened(setup)] == [(SQUARE, 8), (WIDE, 6), (TALL, 4)]
    assert "image_editing: no sample belongs to 12x60; these buckets are never drawn" in caplog.text
    assert [batch["pixels"].shape[2:4] for batch in fed_shapes(setup).values()] == [SQUARE, WIDE, TALL]
    caplog.clear()
    assert [one.count for one in inputs.opened(run(place / "out", sizes=(SQUARE,)))] == [8]
    assert "samples that belong to no bucket of image_editing are not read: 12x24 (6), 24x12 (4)" in caplog.text


def numbers(batch):
    """The size of a batch, and the numbers of its samples, which all their pixels are."""
    assert (batch["pixels"] == batch["pixels"][:, :1, :1, :1, :1]).all()
    assert (batch["pixels"] == batch["source"]).all()
    return batch["pixels"].shape[2:4], batch["pixels"][:, 0, 0, 0, 0].tolist()


def test_batches_are_of_one_size_reach_every_sample_and_resume_exactly(place, setup):
    stream = inputs.batches(setup)
    drawn = [numbers(next(stream)) for _ in range(40)]
    expected = {SQUARE: set(range(8)), WIDE: set(range(8, 14)), TALL: set(range(14, 18))}
    found = {size: {n for where, some in drawn if where == size for n in some} for size in expected}
    assert found == expected and {size for size, _ in drawn} == expected.keys()

    again = inputs.batches(setup)
    assert [numbers(next(again)) for _ in range(11)] == drawn[:11]
    position = json.loads(json.dumps(again.get_state()))
    resumed = inputs.batches(setup)
    next(resumed)
    resumed.set_state(position)
    assert [numbers(next(resumed)) for _ in range(29)] == drawn[11:]


def description(setup):
    return describe(fingerprint(make_job(setup), fit_config(setup)))


def test_a_run_goes_on_with_the_same_samples_elsewhere_and_with_no_others(place, setup, tmp_path):
    shutil.copytree(place / "out", tmp_path / "moved")
    saved = json.loads(json.dumps(description(setup)))
    moved = dataclasses.replace(setup.sources[0], path=str(tmp_path / "moved"))
    check_same(saved, description(dataclasses.replace(setup, sources=(moved,))), "run")

    edits(tmp_path / "rows", pictures={(30, 30): (8, SQUARE), (20, 40): (6, WIDE), (50, 31): (5, TALL)})
    sort(tmp_path / "rows", tmp_path / "more")
    more = dataclasses.replace(setup.sources[0], path=str(tmp_path / "more"))
    with pytest.raises(
        UserError, match=r"of another config: sizes\.json of sources\[0\] was \[.*'24x12: 4 samples"
    ) as e:
        check_same(saved, description(dataclasses.replace(setup, sources=(more,))), "run")
    assert "'24x12: 5 samples" in str(e.value) and "\n" not in str(e.value) and "--config" not in str(e.value)


def removed(out):
    shutil.rmtree(out / "24x12")


def edited(out):
    text = (out / "sizes.json").read_text()
    (out / "sizes.json").write_text(text.replace('"samples": 8', '"samples": 9'))


def exchanged(out):
    removed(out)
    shutil.copytree(out / "12x24", out / "24x12")


def unfinished(out):
    (out / "sizes.json").unlink()


def other(out):
    (out / "sizes.json").write_text('{"sizes": [[24, 24]]}')


REFUSED = {
    removed: r"out: no folder 24x12, which the bucket of 24 x 12 pixels reads; there are 12x24 \(6\), 24x24 \(8\);",
    edited: r"sizes.json is damaged: it is not what was written",
    exchanged: r"24x12: these 6 samples are not the 4 that sizes.json names; delete .*out and sort them again",
    unfinished: r"out: no sizes.json there; a source with by_size is a folder that `metacanvas prepare",
    other: r"sizes.json: no list of sizes of `metacanvas prepare --by-bucket`",
}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_run_refuses_a_sorted_source_that_is_not_whole(place, tmp_path, damage):
    shutil.copytree(place / "out", tmp_path / "out")
    damage(tmp_path / "out")
    setup = run(tmp_path / "out")
    with pytest.raises(UserError, match=REFUSED[damage]) as caught:
        make_job(setup)
        inputs.opened(setup)
    assert "\n" not in str(caught.value)


def test_a_bucket_of_another_size_names_the_sizes_that_there_are(place):
    setup = run(place / "out", sizes=(SQUARE, (36, 12)))
    with pytest.raises(UserError, match=r"no folder 36x12, which .*; there are 12x24 \(6\), 24x12 \(4\), 24x24 \(8\)"):
        inputs.opened(setup)
    with pytest.raises(UserError, match="no bucket of image_editing with a weight above zero has samples in its fol"):
        inputs.opened(run(place / "out", sizes=(LONG,)))


def test_the_only_sample_of_a_size_is_trained_on_and_others_keep_some_out(place):
    setup = run(place / "few", sizes=(SQUARE, WIDE), validation=0.3)
    square, wide = inputs.opened(setup)
    assert (square.count, square.held_out) == (1, 0) and wide.count + wide.held_out == 3 and wide.held_out
    assert inputs.sources_of(setup, square.bucket, validation=True) == []
    (shown,) = by_size.looked_at(setup)
    assert shown.size == WIDE and len(held_out(setup, shown)) == wide.held_out
    with pytest.raises(UserError, match="no samples of image_editing 1x24x24 are kept out of the training"):
        held_out(setup, square.bucket)


def test_configs_that_contradict_themselves_are_refused(setup):
    plain = SourceSection("records", "data/plain", TASK)
    with pytest.raises(UserError, match="of the sources of image_editing some have by_size=True and some False"):
        check(dataclasses.replace(setup, sources=(*setup.sources, plain)))
    with pytest.raises(
        UserError, match="two buckets of image_editing have 24 x 24 pixels; with by_size each needs a si"
    ):
        check(dataclasses.replace(setup, buckets=(*setup.buckets, setup.buckets[0])))
    slow = dataclasses.replace(setup.buckets[0], fps=3.0)
    with pytest.raises(UserError, match="buckets of image_editing must have the same frames and fps, as their sources"):
        check(dataclasses.replace(setup, buckets=(slow, *setup.buckets[1:])))
    with pytest.raises(ValueError, match=r"by_size is for what .* wrote, not for a source of kind 'jsonl'"):
        SourceSection("jsonl", "rows", TASK, by_size=True)
    check(setup)


def test_the_samples_of_a_user_are_taken_sorted_and_else_refused_with_the_command_that_sorts_them(place, tmp_path):
    config = load_config("configs/image_editing.py:ratios", [])
    with pytest.raises(
        UserError, match=r"sort these first: metacanvas prepare --by-bucket .*--source jsonl --path .*/rows"
    ):
        own_data.use(config, str(place / "rows"), tmp_path)
    notes = own_data.use(config, str(place / "out"), tmp_path)
    assert "12x24 (6), 24x12 (4), 24x24 (8) samples" in notes["found"]
    (source,) = experiment(config).sources
    assert (source.kind, source.path, source.task) == ("records", str(place / "out"), TASK)
    assert source.by_size and source.validation == own_data.VALIDATION and source.max_skips == 1
