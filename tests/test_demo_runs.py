"""The table of the demo's runs: what is planned, what is compared, and what a missing run leaves open."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo_runs():
    path = Path(__file__).parent.parent / "benchmarks" / "demo_runs.py"
    spec = importlib.util.spec_from_file_location("demo_runs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_runs"] = module
    spec.loader.exec_module(module)
    return module


def result(share, steps=1000, seconds_per_step=0.2):
    scores = {"categories": {"colors": share}, "pictures": share, "shuffled": 0.0}
    held_out = {**scores, "pictures": share / 2}
    return {
        "exit_code": 0,
        "seconds": 500.0,
        "peak_gib": 2.0,
        "steps": steps,
        "seconds_per_step": seconds_per_step,
        "scores": {"seen": scores, "held_out": held_out},
    }


def test_a_command_is_measured(demo_runs):
    code, peak = demo_runs.measured([sys.executable, "-c", "raise SystemExit(3)"], {})
    assert code == 3 and 0 < peak < 1


def test_nine_runs_and_two_of_text_only_for_every_seed(demo_runs):
    names = [run.name for run in demo_runs.planned()]
    assert len(names) == len(set(names)) == 15
    assert sum(name.startswith("canvas") for name in names) == 9
    assert "text_2_default_seconds" in names


def test_equal_seconds_wait_for_both_paces(demo_runs, tmp_path):
    assert demo_runs.equal_seconds(tmp_path, 0) is None
    (tmp_path / "canvas_0_default.json").write_text(json.dumps(result(0.5)))
    assert demo_runs.equal_seconds(tmp_path, 0) is None
    (tmp_path / "text_0_default_steps.json").write_text(json.dumps(result(0.5, seconds_per_step=0.1)))
    assert demo_runs.equal_seconds(tmp_path, 0) == 2000
    run = next(run for run in demo_runs.planned() if run.name == "text_0_default_seconds")
    words = demo_runs.command(run, Path("work"), 2000)
    assert "--config.train.steps=2000" in words and "--config.optimizer.total_steps=2000" in words


def test_the_table_has_means_bars_and_paired_differences(demo_runs, tmp_path):
    for seed, share in enumerate((0.7, 0.8, 0.9)):
        (tmp_path / f"canvas_{seed}_default.json").write_text(json.dumps(result(share)))
        (tmp_path / f"text_{seed}_default_steps.json").write_text(json.dumps(result(share - 0.2)))
    lines = demo_runs.table(tmp_path).splitlines()
    assert lines[0].startswith("3 of 9 runs")
    # The mean .8 has the error .1 / sqrt(3).
    assert "| colors | 0.800 | 0.058 | 0.700 | 0.627 |" in lines
    assert "| equal steps | 3 | +0.200 +- 0.000 | +0.100 +- 0.000 |" in lines
    assert "| equal seconds | 0 | - | - |" in lines
