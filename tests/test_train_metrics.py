import json

import jax
import pytest

from metacanvas_jax.hardware import CHIPS
from metacanvas_jax.train.metrics import (
    Meter,
    Writer,
    measured_peak,
    model_flops_utilisation,
    peak_flops,
    read_metrics,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_meter_counts_neither_compilation_nor_pauses():
    clock = Clock()
    meter = Meter(clock)
    clock.now += 60  # compilation
    meter.tick(16)
    assert meter.read() is None
    for samples in (2, 2, 16, 8):  # batches of several buckets
        clock.now += 0.5
        meter.tick(samples, 1e6 * samples)
    with meter.paused():
        clock.now += 30
    assert meter.read() == pytest.approx((2.0, 14.0, 14e6, 0.0))
    with meter.waiting():
        clock.now += 4
    clock.now += 1
    meter.tick(1)
    assert meter.read() == pytest.approx((0.2, 0.2, 0.0, 0.8))


def test_pause_during_compilation_is_not_counted_twice():
    clock = Clock()
    meter = Meter(clock)
    with meter.paused():
        clock.now += 10
    meter.tick(3)
    clock.now += 2
    meter.tick(3)
    assert meter.read()[:2] == pytest.approx((0.5, 1.5))


def test_steps_that_are_complete_at_once_after_a_pause_are_no_burst_of_speed():
    clock = Clock()
    meter = Meter(clock)
    meter.tick(8)
    rates = []
    for _ in range(8):
        for taken in (0.3, 0.0, 0.0):  # the queue of started steps has emptied
            clock.now += taken
            meter.tick(8)
            rates.append(meter.read().samples)
    assert max(rates[9:]) < 1.3 * 80 and min(rates[9:]) > 0.7 * 80, "8 samples in 0.1 s"
    assert meter.read() is None, "no step since the last reading"


def test_utilisation_of_the_published_wan_step_is_29_6_percent():
    # MaxDiffusion's Wan2.1-14B log on v5p-8: 36.0 s per step at 135.9 TFLOP/s on each of 4 chips.
    flops = 135.9e12 * 4 * 36.0
    assert model_flops_utilisation(flops, 36.0, CHIPS["v5p"].flops, 4) == pytest.approx(0.296, abs=5e-4)


def test_peak_of_a_cpu_is_measured_not_known():
    assert peak_flops(jax.devices()[0]) is None
    assert 1e8 < measured_peak(size=128) < 1e14


def test_records_beyond_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    writer = Writer(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3})
    writer.write(5, {"score": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 5]
    assert read_metrics(tmp_path)[-1] == {"step": 5, "score": None}

    writer = Writer(tmp_path, resume=3)
    writer.write(4, {"loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": n, "loss": n / 3} for n in (1, 2, 3)] + [{"step": 4, "loss": 7.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_records_can_be_followed_while_a_run_goes_on(tmp_path):
    """And what is ahead of the checkpoint is still dropped by the run that goes on from it."""
    clock = Clock()
    writer = Writer(tmp_path, every_s=10.0, clock=clock)
    seen = []
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
        seen.append(len(read_metrics(tmp_path)))
        clock.now += 4
    assert seen == [1, 1, 1, 4, 4]
    again = Writer(tmp_path, resume=2)  # the first was killed: never flushed, never closed
    again.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    writer.close()
