"""The table of the demo's runs: what is planned, what is compared, and what a missing run leaves open."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def demo_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("demo_runs")


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


def test_a_command_is_measured_whatever_its_parent_holds(demo_runs):
    held = np.ones(3 * 2**26)  # 1.5 GiB
    code, peak = demo_runs.measured([sys.executable, "-c", "raise SystemExit(3)"], {})
    assert code == 3 and 0 < peak < 0.5
    code, peak = demo_runs.measured([sys.executable, "-c", "x = bytearray(2**29); x[::4096] = x[::4096]"], {})
    assert code == 0 and 0.5 < peak < 1
    assert held.any()


def test_the_end_of_a_command_by_a_signal_is_told(demo_runs):
    words = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert demo_runs.measured(words, {})[0] == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="nowhere: the command was not run"):
        demo_runs.measured(["/nowhere"], {})


@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_signal_reaches_the_command_which_may_still_finish(number, to, tmp_path):
    waits = "import pathlib, signal, sys, time; signal.signal(int(sys.argv[1]), lambda *_: sys.exit(7)); "
    waits += "pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"
    words = [sys.executable, "-c", waits, str(int(number)), str(tmp_path / "up")]
    reading, writing = os.pipe()
    script = [sys.executable, "-I", "-S", str(BENCHMARKS / "peak_memory.py"), str(writing), *words]
    between = subprocess.Popen(script, pass_fds=(writing,), start_new_session=True)
    os.close(writing)
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    to(between.pid, number)
    with os.fdopen(reading) as report:
        status, _ = json.loads(report.read())
    assert os.waitstatus_to_exitcode(status) == 7 and between.wait() == 0


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


def test_the_pace_of_a_training_is_that_of_its_rows(demo_runs, tmp_path):
    rows = [{"step": 10, "steps_per_second": 5.0}, {"step": 20, "steps_per_second": 4.0}, {"step": 20, "score": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert demo_runs.pace(tmp_path) == (20, pytest.approx(0.225))


def test_the_table_has_means_bars_and_paired_differences(demo_runs, tmp_path):
    for seed, share in enumerate((0.7, 0.8, 0.9)):
        (tmp_path / f"canvas_{seed}_default.json").write_text(json.dumps(result(share)))
        (tmp_path / f"text_{seed}_default_steps.json").write_text(json.dumps(result(share - 0.2)))
    lines = demo_runs.table(tmp_path).splitlines()
    assert lines[0].startswith("3 of 9 runs")
    # The runs deviate by .1 from their mean .8, whose error is .1 / sqrt(3).
    assert any(line.startswith("| colors | 0.800 | 0.058 | 0.700 | 0.500 |") for line in lines)
    assert "| equal steps | 3 | +0.200 +- 0.000 | +0.100 +- 0.000 |" in lines
    assert "| equal seconds | 0 | - | - |" in lines
