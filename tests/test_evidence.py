"""The comparisons of docs/results.md: configs that differ in one thing, verdicts, a page that follows from its rows."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence as evidence_runs  # noqa: E402
import evidence_page  # noqa: E402
from evidence_plan import EXPERIMENTS, SECONDS, SEEDS, VARIANTS  # noqa: E402
from evidence_rows import Results, difference, figures, judged, read, verdict  # noqa: E402
from evidence_told import Told  # noqa: E402

from configs import evidence, evidence_tasks  # noqa: E402
from metacanvas_jax.config.load import load_config  # noqa: E402
from metacanvas_jax.config.read import experiment  # noqa: E402
from metacanvas_jax.data.inputs import Inputs, opened  # noqa: E402
from metacanvas_jax.worlds.animations import animation  # noqa: E402
from metacanvas_jax.worlds.edits import KINDS, edit  # noqa: E402
from metacanvas_jax.worlds.facts import WORD  # noqa: E402


def row(variant, seed, seen, held_out=0.2):
    scores = {
        "seen": {"pictures": seen, "categories": {"place": seen}},
        "held_out": {"pictures": held_out, "categories": {}},
    }
    curve = [[250, seen / 2], [500, seen]]
    rest = {"steps": 500, "seconds_per_step": 0.1, "commit": "0" * 40, "machine": "2 cores"}
    return {"variant": variant, "seed": seed, "scores": scores, "curve": curve, **rest}


@pytest.mark.miniature
@pytest.mark.parametrize("variant", evidence.VARIANTS)
def test_every_variant_is_a_config_of_frozen_readers(variant):
    setup = experiment(evidence.get_config(variant))
    assert (setup.canvas is None) == (variant in ("text", "metaquery", "text_metaquery"))
    assert (setup.text is None) == (variant == "metaquery") and (setup.queries is None) == ("query" not in variant)
    assert ("(mllm|text|vae)/.*", "freeze") in setup.train.rules
    assert (setup.train.rules[0] == ("mllm/.*_lora/.*", "train")) == (variant == "mllm_lora")


@pytest.mark.miniature
@pytest.mark.parametrize("name", VARIANTS)
def test_the_values_of_a_run_are_values_of_its_config(name):
    variant = VARIANTS[name]
    setup = experiment(load_config(f"configs/{variant.file}.py:{variant.config}", evidence_runs.flags(variant, 7)))
    assert setup.seed == 7 and "7" in setup.vae_weights
    assert all(source.seed == 7 and not source.path for source in setup.sources)
    assert setup.sources or setup.data.path.endswith("data_7")


def test_what_is_compared_is_run():
    files = {"evidence": evidence.VARIANTS, "evidence_tasks": evidence_tasks.VARIANTS}
    assert all(variant.config in files[variant.file] for variant in VARIANTS.values())
    for one in EXPERIMENTS:
        for hypothesis in one.hypotheses:
            assert {hypothesis.better, hypothesis.worse} <= set(one.variants) <= set(VARIANTS)


def test_verdicts_need_two_standard_errors():
    assert verdict(0.10, 0.04) == "**confirmed**" and verdict(-0.10, 0.04) == "**opposite**"
    assert verdict(0.07, 0.04) == "not confirmed" and verdict(0.1, float("nan")) == "not run"


def test_differences_are_paired_by_seed():
    rows = {("canvas", seed): row("canvas", seed, 0.5 + 0.1 * seed) for seed in SEEDS}
    rows |= {("text", seed): row("text", seed, 0.4 + 0.1 * seed) for seed in SEEDS[:2]}
    results = Results(rows)
    mean, error, count = difference(results, "canvas", "text", "seen")
    assert abs(mean - 0.1) < 1e-9 and error < 1e-9 and count == 2
    page = evidence_page.page(results)
    assert "| text and canvas | 3 | 0.600 ± 0.058 |" in page and "Not run: canvas_only 0" in page


def test_a_difference_is_not_surer_than_counting_allows():
    rows = {(name, seed): row(name, seed, share) for name, share in (("canvas", 0.6), ("text", 0.5)) for seed in SEEDS}
    for one in rows.values():
        one["scores"]["seen"]["counts"] = {"place": 50, "colors": 50}
    mean, error, _ = difference(Results(rows), "canvas", "text", "seen")
    assert abs(mean - 0.1) < 1e-9 and abs(error - ((0.24 + 0.25) / 100 / 3) ** 0.5) < 1e-9
    assert difference(Results(rows), "canvas", "text", "place")[1] > error  # of half as many pictures


def test_at_equal_seconds_the_slower_run_is_read_where_the_faster_one_ends():
    rows = {("text", seed): row("text", seed, 0.4) for seed in SEEDS}
    rows |= {("canvas", seed): row("canvas", seed, 0.6) for seed in SEEDS}
    results = Results(rows, {"text": 0.1, "canvas": 0.2})
    mean, error, count = difference(results, "canvas", "text", SECONDS)
    assert abs(mean + 0.1) < 1e-9 and count == 3  # .3 after half of the steps, against .4
    assert abs(error - ((0.3 * 0.7 + 0.4 * 0.6) / 140 / 3) ** 0.5) < 1e-9
    assert difference(Results(rows), "canvas", "text", SECONDS)[2] == 0  # no pace was measured


def test_frames_of_videos_are_counted_by_themselves():
    """A video with a fault in one frame is wrong, and four of its five frames are right."""
    results = {
        "text_to_video": [
            {"kind": "one drawing", "reasons": ["frame 1: expected a red cat", "frame 1: found  something unknown"]},
            {"kind": "one drawing", "reasons": ["red cat, moving up: it moved down"]},
        ],
        "video_editing": [{"kind": "remove", "reasons": []}],
    }
    scores = evidence_runs.compact({"results": results})
    assert scores["tasks"] == {"text_to_video": 0.0, "video_editing": 1.0}
    assert scores["frames"] == pytest.approx({"text_to_video": 0.9, "video_editing": 1.0})
    run = {"variant": "motion_1", "seed": 0, "curve": [[10, 0.5]], "scores": scores}
    assert figures(run)["text to video: right frames"] == pytest.approx(0.9)
    assert judged(run, "text to video: right frames") == 2  # videos, not frames
    assert judged(run, "mean of the curve") == 100


def test_the_page_follows_from_the_rows_of_the_repository():
    results, page = read(ROOT / "benchmarks/results"), ROOT / "docs/results.md"
    assert page.exists() == bool(results.rows)
    assert not results.rows or page.read_text() == evidence_page.page(results)


def test_the_readme_says_what_the_rows_say():
    results, words = read(ROOT / "benchmarks/results"), " ".join((ROOT / "README.md").read_text().split())
    for name in ("edit_canvas", "edit_text"):
        right = np.mean([figures(results.rows[name, seed])["right"] for seed in SEEDS])
        assert f"{right:.3f}".removeprefix("0") in words
    for figure in ("seen", "held out"):
        mean, error, count = difference(results, "canvas", "text", figure)
        assert count == len(SEEDS) and f"{mean:+.3f} ± {error:.3f}".replace("0.", ".") in words


def test_plots_and_page_are_written_together(tmp_path):
    rows = {("canvas", seed): row("canvas", seed, 0.5) for seed in SEEDS}
    found = {"faults": {"canvas": {"0": {"missing": 0.25}}}, "probe": {"canvas": {"0": 0.5, "1": 0.7}}}
    results = Results(rows, {"canvas": 0.1}, found)
    evidence_page.write(tmp_path, results)
    page = (tmp_path / "results.md").read_text()
    assert page == evidence_page.page(results)
    assert "| text and canvas | 0.250 |" in page and "| text and canvas | 0.600 ± 0.100 |" in page
    for one in EXPERIMENTS:
        path = tmp_path / "results" / f"{one.name}.png"
        assert path.exists() == ("canvas" in one.variants) == (f"(results/{one.name}.png)" in page)
        assert not path.exists() or path.stat().st_size > 5000


def test_tasks_are_scored_by_task_and_kind():
    results = {
        "text_to_video": [{"kind": "one drawing", "reasons": []}, {"kind": "two drawings", "reasons": ["no cat"]}],
        "video_editing": [{"kind": "remove", "reasons": []}],
    }
    scores = evidence_runs.compact({"scores": {}, "results": results})
    shown = figures({"scores": scores, "curve": [[1, 0.5]]})
    assert shown["right"] == 0.75 and shown["text to video"] == 0.5 and shown["video editing: remove"] == 1.0
    one = evidence_runs.compact({"scores": {}, "results": {"image_editing": [{"kind": "add", "reasons": ["x"]}]}})
    assert figures({"scores": one, "curve": [[1, 0.5]]})["add"] == 0.0
    assert evidence_runs.compact({"seen": {}}) == {"seen": {}}


def test_instructions_tell_what_is_changed_and_how():
    told = Told(experiment(evidence_tasks.get_config("motion_0")).world)
    cases = {
        "make the red cat blue": ("recolour", {"object": "cat", "colour": "red"}, {"colour": "blue"}),
        "change the colour of the pink cat to red": (
            "recolour", {"object": "cat", "colour": "pink"}, {"colour": "red"},
        ),
        "add an orange duck in the centre": ("add", {"object": "duck", "colour": "orange"}, {"place": "in the centre"}),
        "take the pink house away": ("remove", {"object": "house", "colour": "pink"}, {}),
        "move the red car to the top left corner": (
            "move", {"object": "car", "colour": "red"}, {"place": "in the top left corner"},
        ),
        "show three red cars instead of two": ("count", {"object": "car", "colour": "red"}, {"count": 3}),
        "change the number of red cars to two": ("count", {"object": "car", "colour": "red"}, {"count": 2}),
    }  # fmt: skip
    for text, (kind, group, becomes) in cases.items():
        _, ((read, before), (end, after)) = told.instruction(text)
        assert text[:read].endswith(group["object"]) or text[:read].endswith(group["object"] + "s")
        expected = told.known(**group)
        expected[told.kinds + KINDS.index(kind)] = WORD
        assert end == len(text) and (before == expected).all() and (after == expected + told.known(1, **becomes)).all()
    with pytest.raises(ValueError, match="names no group"):
        told.instruction("make it blue")


def test_every_instruction_and_motion_of_the_world_is_told():
    told = Told(experiment(evidence_tasks.get_config("motion_0")).world)
    for index in range(60):
        made = edit(told.facts.world, 3, index)
        text, ends = told.instruction(made.instruction)
        assert ends[-1][0] == len(text) and ends[-1][1][told.kinds + KINDS.index(made.kind)] == WORD
        moving = animation(told.facts.world, 3, index)
        prompt, ends = told.motions(moving)
        assert [prompt[:end].endswith(mover.motion) for mover, (end, _) in zip(moving.movers, ends[1::2], strict=True)]
        assert ends[-1][0] == len(prompt) and len(ends) == 2 * len(moving.movers)


@pytest.mark.miniature
@pytest.mark.parametrize("variant", evidence_tasks.VARIANTS)
def test_tasks_have_a_canvas_of_as_many_keyframes_as_they_say(variant):
    setup = experiment(evidence_tasks.get_config(variant))
    keyframes = 0 if setup.canvas is None else setup.canvas.keyframes
    assert keyframes == {"edit_canvas": 1, "edit_text": 0}.get(variant, variant[-1].isdigit() and int(variant[-1]))
    assert (setup.train.rules[0] == ("mllm/.*_lora/.*", "train")) == bool(keyframes)


@pytest.mark.miniature
@pytest.mark.parametrize("variant", evidence_tasks.VARIANTS)
def test_prompts_of_tasks_fit_into_what_is_read_of_them(variant, caplog):
    setup = experiment(evidence_tasks.get_config(variant))
    inputs, rng = Inputs(setup), np.random.default_rng(0)
    for one in opened(setup):
        examples = inputs.examples(one.bucket)
        rows = [examples(one.sources[0].records[index], rng) for index in range(40)]
        longest = max(int(row["mask"].sum()) for row in rows) if setup.uses_mllm else 0
        assert longest <= one.bucket.length
        assert all(not row["text_mask"].all() for row in rows), "nothing may be cut off"
    assert "loses its last words" not in caplog.text
