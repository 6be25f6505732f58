"""The comparisons of docs/results.md: configs that differ in one thing, verdicts, a page that follows from its rows."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence_page  # noqa: E402
from evidence_plan import EXPERIMENTS, SECONDS, SEEDS, VARIANTS  # noqa: E402

from configs import evidence  # noqa: E402
from metacanvas_jax.config.read import experiment  # noqa: E402


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


def test_what_is_compared_is_run():
    known = {variant.config for variant in VARIANTS.values()}
    assert known <= set(evidence.VARIANTS)
    for one in EXPERIMENTS:
        for hypothesis in one.hypotheses:
            assert {hypothesis.better, hypothesis.worse} <= set(one.variants) <= set(VARIANTS)


def test_verdicts_need_two_standard_errors():
    assert evidence_page.verdict(0.10, 0.04) == "**confirmed**" and evidence_page.verdict(-0.10, 0.04) == "**opposite**"
    assert (
        evidence_page.verdict(0.07, 0.04) == "not confirmed" and evidence_page.verdict(0.1, float("nan")) == "not run"
    )


def test_differences_are_paired_by_seed():
    rows = {("canvas", seed): row("canvas", seed, 0.5 + 0.1 * seed) for seed in SEEDS}
    rows |= {("text", seed): row("text", seed, 0.4 + 0.1 * seed) for seed in SEEDS[:2]}
    mean, error, count = evidence_page.difference(rows, "canvas", "text", "seen")
    assert abs(mean - 0.1) < 1e-9 and error < 1e-9 and count == 2
    page = evidence_page.page(rows)
    assert "| text and canvas | 3 | 0.600 ± 0.058 |" in page and "Not run: canvas_only 0" in page


def test_at_equal_seconds_the_slower_run_is_read_where_the_faster_one_ends():
    rows = {("text", seed): row("text", seed, 0.4) for seed in SEEDS}
    rows |= {("canvas", seed): row("canvas", seed, 0.6) | {"seconds_per_step": 0.2} for seed in SEEDS}
    mean, error, count = evidence_page.difference(rows, "canvas", "text", SECONDS)
    assert abs(mean + 0.1) < 1e-9 and error < 1e-9 and count == 3  # .3 after half of the steps, against .4


def test_the_page_follows_from_the_rows_of_the_repository():
    rows, page = evidence_page.read(ROOT / "benchmarks/results/evidence"), ROOT / "docs/results.md"
    assert page.exists() == bool(rows)
    assert not rows or page.read_text() == evidence_page.page(rows)


def test_plots_and_page_are_written_together(tmp_path):
    rows = {("canvas", seed): row("canvas", seed, 0.5) for seed in SEEDS}
    evidence_page.write(tmp_path, rows)
    assert (tmp_path / "results.md").read_text() == evidence_page.page(rows)
    for one in EXPERIMENTS:
        assert (tmp_path / "results" / f"{one.name}.png").stat().st_size > 5000
        assert f"(results/{one.name}.png)" in evidence_page.page(rows)
