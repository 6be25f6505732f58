"""Scores per category, GenEval's result lines, and the control with shuffled prompts."""

import json

import numpy as np
import pytest

from metacanvas_jax.evaluate import geneval
from metacanvas_jax.worlds import scenes
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.scenes import SceneWorld

pytestmark = pytest.mark.miniature

WORLD = SceneWorld()


@pytest.fixture(scope="module")
def judge():
    return Judge(WORLD)


@pytest.fixture(scope="module")
def prompts():
    return scenes.eval_prompts(WORLD, "seen", 4)


@pytest.fixture(scope="module")
def pictures(prompts):
    return np.stack([scenes.draw(WORLD, scene) for scene in prompts])


def test_true_pictures_score_one_and_never_with_shuffled_prompts(judge, prompts, pictures):
    scores = geneval.evaluate(judge, pictures, prompts).scores
    assert set(scores.categories) == set(scenes.CATEGORIES)
    assert set(scores.categories.values()) == {1.0}
    assert (scores.overall, scores.pictures, scores.shuffled) == (1.0, 1.0, 0.0)


def test_overall_is_the_mean_over_categories_not_over_pictures(judge, prompts, pictures):
    some = [scene for scene in prompts if scene.category == "colors"] + [
        scene for scene in prompts if scene.category == "position"
    ][:2]
    images = [scenes.draw(WORLD, scene) for scene in some[:4]] + [np.full_like(pictures[0], 255)] * 2
    scores = geneval.evaluate(judge, images, some).scores
    assert scores.categories == {"colors": 1.0, "position": 0.0}
    assert scores.counts == {"colors": 4, "position": 2}
    assert scores.overall == 0.5
    assert scores.pictures == pytest.approx(4 / 6)


class _NextFirst:
    """Instead of a random generator: proposes for every picture the prompt after its own."""

    def __init__(self):
        self.turn = 0

    def permutation(self, n):
        self.turn += 1
        return np.roll(np.arange(n), -self.turn)


def test_shuffled_control_counts_pictures_that_show_the_other_prompt(judge, prompts, monkeypatch):
    shown = [prompts[(i + 1) % len(prompts)] if i % 2 else scene for i, scene in enumerate(prompts)]
    verdicts = judge.verdicts([scenes.draw(WORLD, scene) for scene in shown], [scene.metadata for scene in prompts])
    monkeypatch.setattr(geneval.np.random, "default_rng", lambda seed: _NextFirst())
    assert geneval.shuffled_control(judge, verdicts, prompts) == 0.5


def test_results_have_genevals_fields(judge, prompts, pictures, tmp_path):
    images = pictures.copy()
    images[0] = 255
    evaluation = geneval.evaluate(judge, images, prompts)
    geneval.write_results(tmp_path, images, evaluation)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(prompts)
    assert set(lines[0]) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert lines[0]["correct"] is False
    assert lines[0]["reason"].startswith("expected 1 ")
    assert json.loads(lines[0]["metadata"]) == prompts[0].metadata
    assert evaluation.correct == (False, *[True] * (len(prompts) - 1))
    item = prompts[1].items[0]
    left, top, right, bottom, confidence = json.loads(lines[1]["details"])[item.object][0]
    assert item.x <= left < right <= item.x + 24 and item.y <= top < bottom <= item.y + 24 and confidence > 0.99
    assert (tmp_path / lines[1]["filename"]).is_file()
    assert json.loads((tmp_path / "scores.json").read_text())["pictures"] == evaluation.scores.pictures


def test_table_shows_every_split_and_leaves_what_is_missing_open(judge, prompts, pictures):
    seen = geneval.evaluate(judge, pictures, prompts).scores
    some = [i for i, scene in enumerate(prompts) if scene.category == "counting"]
    held = geneval.evaluate(judge, pictures[some], [prompts[i] for i in some]).scores
    lines = {line.split()[0]: line.split()[1:] for line in geneval.table({"seen": seen, "held_out": held}).splitlines()}
    assert lines["category"] == ["seen", "held_out"]
    assert lines["counting"] == ["1.000", "1.000"]
    assert lines["position"] == ["1.000", "-"]
    assert lines["shuffled"][0] == "0.000"


def test_numbers_of_pictures_and_prompts_must_agree(judge, prompts, pictures):
    with pytest.raises(ValueError, match="one picture for each of 32 prompts, got 31"):
        geneval.evaluate(judge, pictures[1:], prompts)
