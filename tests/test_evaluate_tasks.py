"""The evaluator of tasks: every miniature has a score per task, truth scores 1 and what random networks draw 0."""

import dataclasses
import json

import numpy as np
import pytest
from evaluate_support import painter, params
from experiments_support import FILES, build, variants

from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import evaluators, tasks
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.held_out import held_out
from metacanvas_jax.launch import training
from metacanvas_jax.paint import previews
from metacanvas_jax.paint.painter import Drawn, Painter
from metacanvas_jax.tasks import TASKS
from metacanvas_jax.train.job import fit_config

pytestmark = pytest.mark.miniature

SIX = ("text_to_image", "image_editing", "text_to_video", "image_to_video", "video_editing", "reference_to_video")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return painter(tmp_path_factory.mktemp("videos"), "video_stage3")


class Perfect(Painter):
    """Draws the truth, and remembers what it was asked."""

    def paint(self, params, samples, bucket, **options):
        self.asked = [*getattr(self, "asked", []), (bucket.task, len(samples), options)]
        return Drawn(np.stack([sample.target for sample in samples]))


class Lazy(Painter):
    """Draws what it was given: the source, the first frame all the time, or nothing."""

    def paint(self, params, samples, bucket, **options):
        def one(sample):
            if sample.source is not None:
                return sample.source
            given = sample.task in ("image_to_video", "reconstruction")
            return (
                np.repeat(sample.target[:1], len(sample.target), axis=0) if given else np.full_like(sample.target, 255)
            )

        return Drawn(np.stack([one(sample) for sample in samples]))


def test_truth_is_right_in_every_task(videos, tmp_path):
    perfect = Perfect(videos.setup)
    scores = evaluators.run(perfect, {}, ("tasks",), Asked(seed=5, guidance=2.0, canvas=False))["tasks"]
    assert scores.metrics() == {"score": 1.0, **{f"score_{task}": 1.0 for task in SIX}}
    assert [(task, count) for task, count, _ in perfect.asked] == [(task, 4) for task in SIX]
    assert perfect.asked[0][2] == {"seed": 5, "guidance": 2.0, "canvas": False, "progress": False}
    scores.save(tmp_path / "scores.json")
    tree = json.loads((tmp_path / "scores.json").read_text())
    assert tree["scores"] == scores.metrics()
    assert {one["kind"] for one in tree["results"]["image_editing"]} == {"recolour", "add", "remove", "move"}
    assert "image_editing" in scores.table() and "  recolour" in scores.table()


def test_what_was_given_is_wrong_in_every_task(videos):
    """Copying the source, a video that stands still and an empty picture earn nothing."""
    scores = tasks.evaluate(Lazy(videos.setup), {}, Asked())
    assert scores.metrics() == {"score": 0.0, **{f"score_{task}": 0.0 for task in SIX}}
    assert all(one.reasons for results in scores.judged.values() for one in results)


def test_a_training_and_a_limit_draw_few(videos):
    few = dataclasses.replace(videos.setup.eval, samples=3, during_training=2)
    setup = dataclasses.replace(videos.setup, eval=few)
    for asked, count in ((Asked(training=True), 2), (Asked(), 3), (Asked(limit=1), 1)):
        assert {len(results) for results in tasks.evaluate(Perfect(setup), {}, asked).judged.values()} == {count}


def test_random_networks_are_judged(tmp_path):
    drawing = painter(tmp_path, "t2i_scratch", "text")
    scores = tasks.evaluate(drawing, params(drawing.setup), Asked(limit=2))
    assert scores.metrics()["score"] == 0.0
    assert {len(results) for results in scores.judged.values()} == {2}


def test_every_task_has_a_judge():
    assert tasks.JUDGES.keys() == TASKS.keys()


def test_a_reconstruction_shows_the_same_drawings_in_the_same_places(videos):
    judge = tasks.Judge(videos.setup.world)
    bucket = next(bucket for bucket in videos.setup.shapes if bucket.task == "text_to_image")
    records = held_out(videos.setup, bucket)
    first, second = (dataclasses.replace(records[i], task="reconstruction") for i in (0, 1))
    assert tasks.judge_one(judge, first, first.target).right
    assert not tasks.judge_one(judge, first, second.target).right
    moved = np.roll(first.target, 6, axis=2)
    assert not tasks.judge_one(judge, first, moved).right


def test_runs_that_the_judge_does_not_know_are_refused(videos):
    setup = videos.setup
    large = dataclasses.replace(setup, buckets=tuple(dataclasses.replace(b, size=(120, 120)) for b in setup.buckets))
    with pytest.raises(UserError, match="60 x 60 pixels, and videos of 5 frames or more; this run draws text_to_image"):
        tasks.evaluate(Perfect(large), {}, Asked())
    short = dataclasses.replace(
        setup, buckets=tuple(dataclasses.replace(b, frames=min(b.frames, 3)) for b in setup.buckets)
    )
    with pytest.raises(UserError, match="this run draws text_to_video of 3 x 60 x 60"):
        tasks.evaluate(Perfect(short), {}, Asked())
    own = dataclasses.replace(setup.sources[0], kind="records", path="data/mine")
    with pytest.raises(UserError, match="this run was trained on data/mine"):
        tasks.evaluate(Perfect(dataclasses.replace(setup, sources=(own,))), {}, Asked())


@pytest.mark.parametrize("file", FILES)
def test_every_shipped_miniature_is_evaluated_at_its_end_with_few_results(file):
    for variant in variants(file):
        for miniature, first in (("miniature", "tasks"), ("emoji", "flow_loss")):
            setup = build(file, f"{variant}.{miniature}")
            names = evaluators.names_of(setup)
            if variant == "ratios":
                first = "flow_loss"  # the judges know drawings of the world's own size only
            assert names[0] == first and "flow_loss" in names
            config = fit_config(setup)
            assert [step for step in range(1, config.steps + 1) if config.due(step).evaluate] == [config.steps]
            assert setup.eval.during_training == previews.SAMPLES, "the program of the previews draws them"
            evaluators.check(setup, names, Asked(training=True))


def test_a_training_that_cannot_be_evaluated_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_missing", lambda setup: None)
    monkeypatch.setattr(training, "make_job", lambda *_, **__: None)
    monkeypatch.setattr(training, "check_workdir", lambda *_: pytest.fail("the training begins"))
    config = load_config("configs/t2i_scratch.py:text.emoji", [])
    with config.ignore_type():
        config.sources = ({**config.sources[0], "validation": 0.0},)
        with pytest.raises(UserError, match="no samples of text_to_image are kept out of the training"):
            training.train(config, tmp_path / "run")
        config.eval.evaluators = ("tasks",)
        with pytest.raises(UserError, match="this run was trained on data/npm"):
            training.train(config, tmp_path / "run")
        config.eval.evaluators = ("vbench",)
        with pytest.raises(UserError, match="the benchmark vbench needs --data"):
            training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
