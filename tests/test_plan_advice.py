"""What a plan advises: knobs in order of gain, each a flag that the config takes; and how long a training lasts."""

import dataclasses
import re
import shlex
import time

import jax
import pytest

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.hardware import CHIPS, GIB, MIB
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, parse_mesh
from metacanvas_jax.plan import page, programs
from metacanvas_jax.plan.advice import Step, advise
from metacanvas_jax.plan.report import Part, Report, failed_report, table
from metacanvas_jax.plan.study import told
from metacanvas_jax.plan.topology import Slice

CONFIG = "configs/t2i_scratch.py:miniature"
MESH = MeshConfig(data=2, fsdp=2)


def step(mesh=MESH, *overrides, batch=32):
    setup = experiment(load_config(CONFIG, [f"--config.train.batch={batch}", *overrides]))
    return Step(setup, Slice("v5e:2x2", CHIPS["v5e"], 1, tuple(jax.devices()[:4])), mesh, setup.shapes[0])


def failed(step, activations, limit):
    """The report of a step whose activations need so many bytes, on a chip of ``limit`` bytes."""
    program = programs.train_program(step.setup, make_mesh(step.mesh, step.where.devices), step.bucket)
    held = sum(program.held.values())
    where = dataclasses.replace(step.where, chip=dataclasses.replace(step.where.chip, hbm=limit))
    return failed_report("a config", program, where, "too large", held + activations), held


def flags_of(line):
    """The words to type in a line of advice."""
    found = re.search(r"(?:less|with): (.*?)(?:  \(|$)", line)
    return shlex.split(found.group(1)) if found else []


def bytes_of(line):
    number, unit = re.match(r"about (-?[\d.]+) (\w+) less", line).groups()
    return float(number) * {"GiB": GIB, "MiB": MIB}[unit]


def check_typed(lines):
    """Every flag is one that `metacanvas plan` and the config take."""
    for line in lines:
        words = flags_of(line)
        overrides = [word for word in words if word.startswith("--config.")]
        experiment(load_config(CONFIG, overrides))
        rest = [word for word in words if word not in overrides]
        if rest[:1] == ["--mesh"]:
            parse_mesh(rest[1])
        else:
            assert rest in ([], ["--search", "8"], ["metacanvas", "prepare", "--latents"]), rest


def test_a_step_that_is_too_large_gets_knobs_in_order_of_gain():
    planned = step(MESH, "--config.train.ema=0.99", "--config.train.frozen_dtype=float32")
    held = held_bytes()
    lines = advise(failed(planned, 4 * held, 2.75 * held)[0], planned)
    gains = [bytes_of(line) for line in lines if line.startswith("about")]
    assert len(gains) > 2 and gains == sorted(gains, reverse=True)
    assert "--config.train.accumulate=4" in lines[0], "of 8 samples on a device: halves do not fit, quarters do"
    gradients = planned.held()["trainable"]  # whose sum over the parts is held, too
    assert gains[0] == pytest.approx(3 * held - gradients, rel=0.01)
    assert any("--config.train.frozen_dtype=bfloat16" in line for line in lines)
    check_typed(lines)


def test_what_is_held_is_computed_from_shapes_for_another_mesh():
    planned = step(MeshConfig(data=4))
    report, held = failed(planned, 0.0, held_limit := 1e6)
    sharded = sum(step(MeshConfig(data=1, fsdp=4)).held().values())
    assert held > 2 * sharded > 0 and report.needed > held_limit
    line = next(line for line in advise(report, planned) if "--mesh fsdp=4" in line)
    assert bytes_of(line) == pytest.approx(held - sharded, rel=0.01)


def test_one_sample_on_a_device_is_cut_along_its_tokens():
    planned = step(batch=4)
    lines = advise(failed(planned, 8 * GIB, 6 * GIB)[0], planned)
    assert any("--mesh data=2,context=2 --config.train.accumulate=2" in line for line in lines)
    check_typed(lines)


def test_what_no_knob_makes_fit_names_the_chips_it_takes():
    planned = step()
    report, _ = failed(planned, 800 * GIB, 1 * GIB)
    assert re.search(r"a slice of at least \d{2,} such chips", advise(report, planned)[-1])


def passed(step, limit=16 * GIB, **fields):
    parts = (
        Part("MLLM prefix", 1e12, 1e12, 1e12, 0.1, 0.0, 0.0, 0.3),
        Part("DiT matmul", 1e12, 1e12, 1e12, 0.5, 0.0, 0.0, 0.1),
    )
    held = step.held()
    needed = sum(held.values()) + GIB
    memory = held | {"activations": GIB}
    known = {"memory": memory, "needed": needed, "limit": limit, "parts": parts, "peak_flops": 1e12}
    return Report("a config", "train", "v5e:2x2", "v5e", 4, step.sizes, 32, True, "PASS", **known | fields)


def test_a_step_that_fits_gets_what_saves_time_and_has_room():
    planned = step(MESH, "--config.dit.remat=full", "--config.train.accumulate=4")
    report = passed(planned, recomputed=0.2)
    lines = advise(report, planned)
    words = [flags_of(line) for line in lines]
    assert words == [
        ["--search", "8"],
        ["--config.mesh.whole=('mllm',)"],
        ["--config.dit.remat=attention"],
        ["--config.train.accumulate=2"],
    ]
    assert [re.match(r"up to ([\d.]+) s", line).group(1) for line in lines] == ["0.400", "0.300", "0.200", "0.200"]
    check_typed(lines)
    full = dataclasses.replace(report, limit=report.needed + 1)
    left = [flags_of(line)[0] for line in advise(full, planned)]
    assert not [word for word in left if "accumulate" in word or "whole" in word], "no room for more"


def test_a_report_says_how_long_the_training_lasts_and_shows_its_advice():
    report = passed(step(), steps=86_400, advice=("up to 0.2 s less: --config.dit.remat=none",))
    assert report.days == pytest.approx(report.expected) and report.chip_hours == pytest.approx(96 * report.expected)
    for text in (table(report), page.html([report])):
        assert f"86,400 such steps take {report.expected:.3g} days, {96 * report.expected:.0f} chip-hours" in text
        assert "--config.dit.remat=none" in text and "make it faster" in text
    assert Report.from_dict(report.to_dict()) == report


def test_a_miniature_has_figures_that_can_be_read():
    report = passed(step(), steps=20)
    parts = (*report.parts, dataclasses.replace(report.parts[0], name="canvas write"))
    small = [dataclasses.replace(part, flops=3e9, products=2e-5, memory=1e-5, collectives=0.0) for part in parts]
    report = dataclasses.replace(report, parts=tuple(small), memory={"batch": 3e6}, needed=3e6, steps=20)
    for text in (table(report), page.html([report])):
        assert (
            "GFLOP" in text and "30.0000" in text and "µs" in text and "PFLOP" not in text.partition("MFU = model")[0]
        )
        assert f"20 such steps take {20e3 * report.expected:.2g} ms" in text
        low, high = report.factors.interval(report.expected)
        assert f"expected: {1e6 * report.expected:.3g} µs ({1e6 * low:.3g} to {1e6 * high:.3g})" in text
        assert f"memory x {report.factors.values['memory']:.2f}: +" in text and "+0.000 s" not in text
    assert "batch: 2.9 MiB" in page.html([report]) and "The canvas adds" in page.html([report])


def test_the_page_of_a_failure_shows_all_that_is_in_memory_and_where_the_chip_ends():
    report, held = failed(step(), 3 * held_bytes(), limit := 2 * held_bytes())
    assert sum(report.memory.values()) == pytest.approx(report.needed) and report.needed == pytest.approx(4 * held)
    shown = page.html([report])
    widths = [float(width) for width in re.findall(r"<span title=\"\w+: [^\"]*\" style=\"width:([\d.]+)%", shown)]
    assert sum(widths) == pytest.approx(100, abs=0.1) and max(widths) == pytest.approx(75, abs=0.1)
    assert f'style="left:{100 * limit / report.needed:.3f}%' in shown


def held_bytes():
    return sum(step().held().values())


def test_a_compilation_says_for_how_long_it_has_gone_on():
    said = []
    with told(said.append, "train: compiling", every_s=0.01):
        time.sleep(0.1)
    assert said[0] == "train: compiling" and len(said) > 2 and said[1] == "train: compiling for 0 s"
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count, "it ends with the compilation"
