"""Expected times of plans: the committed factors follow from the measured jobs, and no measured job beats its bound."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from metacanvas_jax.hardware import CHIPS
from metacanvas_jax.plan import calibration, hlo, hlo_cost, page
from metacanvas_jax.plan.calibration import KINDS, Factors, factors_of
from metacanvas_jax.plan.hlo_cost import Machine
from metacanvas_jax.plan.report import Collective, Kernel, Part, Report, table
from metacanvas_jax.train import flops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def calibrate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("calibrate")


@pytest.fixture(scope="module")
def rows(calibrate):
    data = json.loads(calibrate.JOBS.read_text())
    made = [calibrate.Row.of(job, data["kernels"]) for job in data["jobs"]]
    return [row for row in made if row is not None]


def test_the_committed_factors_follow_from_the_measured_jobs(calibrate, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calibrate.py", "--check"])
    assert calibrate.main() == 0
    assert "| held out |" in capsys.readouterr().out
    changed = json.loads(calibration.FILE.read_text())
    changed["chips"]["v5p"]["products"] += 0.01
    monkeypatch.setattr(calibration, "stored", lambda: changed)
    assert calibrate.main() == 1
    assert "does not follow from the jobs" in capsys.readouterr().err


def test_no_measured_job_was_faster_than_its_bound(rows):
    assert {row.name: row.best / row.seconds for row in rows if row.best > row.seconds} == {}
    # Keys that are gathered over a plane of the torus arrive over more than two links.
    gathered = next(row for row in rows if row.name == "llama2-7b v5p-64 32K gather")
    assert sum(gathered.basis.values()) > gathered.seconds


def test_jobs_are_held_out_and_lie_in_the_range_that_plans_state(calibrate, rows):
    held_out = [row for row in rows if not row.fitted]
    assert len(held_out) >= 4 and any("plan" in row.job for row in held_out)
    for row in held_out:
        expected = sum(row.expected(factors_of(row.chip)).values())
        low, high = factors_of(row.chip).interval(expected)
        assert 0.999 * low <= row.seconds <= 1.001 * high, row.name


def report(chip="v5p"):
    part = Part("DiT matmul", 1e15, 1e15, 1e15, 0.5, 0.4, 0.2, 0.1, host=0.05, starts=1000)
    kernels = (
        Kernel("flash_attention_forward", "DiT matmul", 1, 1e12, 0.1),
        Kernel("flash_attention_backward", "DiT matmul", 1, 1e12, 0.25),
        Kernel("prologue_forward", "DiT matmul", 1, 0.0, 0.05),
    )
    known = {"memory": {}, "needed": 1.0, "limit": 2.0, "parts": (part,), "kernels": kernels, "peak_flops": 1e15}
    return Report("c", "train", "t", chip, 4, {}, 16, True, "PASS", **known)


def test_every_kind_of_seconds_gets_its_own_factor(monkeypatch):
    values = dict(zip(KINDS, (1.1, 1.2, 1.3, 1.5, 2.0, 3.0), strict=True))
    monkeypatch.setattr(Report, "factors", Factors(values, 1e-5, 0.25, "as a test has it"))
    planned = report()
    best = {"products": 0.5, "attention forward": 0.1, "attention backward": 0.25, "memory": 0.2, "collectives": 0.1}
    assert planned.best_by_kind == pytest.approx(best | {"host": 0.05})
    assert planned.seconds == pytest.approx(sum(planned.best_by_kind.values()))
    assert planned.expected == pytest.approx(0.55 + 0.01 + 0.12 + 0.325 + 0.3 + 0.2 + 0.15)
    assert planned.expected_mfu == pytest.approx(1e15 / (4 * 1e15 * planned.expected))
    assert planned.carried[0] == "memory x 1.50: +0.100 s"
    low, high = planned.factors.interval(planned.expected)
    assert (low, high) == pytest.approx((planned.expected / 1.25, planned.expected * 1.25))
    for text in (table(planned), page.html([planned])):
        for words in ("as a test has it", f"expected: {planned.expected:.3f} s ({low:.3f} to {high:.3f})", "1.200 s"):
            assert words in text


def test_the_bound_has_collectives_on_all_links_but_those_between_two_devices():
    gathers = (
        Collective("all-gather", 16, "alone", 1, 1e9, 0.06, 0.06),
        Collective("all-gather", 16, "beside", 1, 1e9, 0.3, 0.03),  # 0.27 s of other work beside it
        Collective("all-gather", 2, "alone", 1, 1e9, 0.01, 0.01),
    )
    planned = dataclasses.replace(report(), collectives=gathers)
    assert planned.reach == pytest.approx((0.06 / 3 + 0.01) / 0.1)
    assert planned.seconds == pytest.approx(report().seconds - 0.07)
    assert planned.expected == report().expected  # over two links
    assert dataclasses.replace(planned, chip="v6e").reach == pytest.approx((0.06 / 2 + 0.01) / 0.1)
    assert dataclasses.replace(planned, topology="v5p:4x4x4*2").reach == 1.0  # the network has no more links
    assert any("collectives x 1.00, over two links: +0.070 s" in line for line in planned.carried)


def test_chips_without_measured_jobs_say_so():
    assert "measured jobs on v5p" in factors_of("v5p").note
    generic = factors_of("v4")
    assert "no job on v4 was measured: generic factors" in generic.note
    assert generic.values == calibration.stored()["generic"] and min(generic.values.values()) >= 1
    gpu = report("h100")
    assert gpu.expected == pytest.approx(gpu.seconds) and "lower bound" in gpu.factors.note


TEXT = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[4096,4096], w: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %w = bf16[4096,4096]{1,0} parameter(1)
  %copy = (bf16[4096,4096]{1,0:S(5)}, bf16[4096,4096]{1,0}, u32[]) copy-start(%a)
  %done = bf16[4096,4096]{1,0:S(5)} copy-done(%copy)
  ROOT %y = bf16[4096,4096]{1,0} convolution(%a, %w), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"9000000"}
}
"""  # noqa: E501


@pytest.mark.parametrize(("chip", "cycles"), [("v5e", 1.2e6), ("v5p", 6e5), ("v6e", 9e6)])
def test_products_are_held_to_what_was_measured(chip, cycles):
    text = TEXT.replace("9000000", str(int(cycles)))
    items = hlo_cost.items(hlo.parse(text), Machine(CHIPS[chip], 4, lambda kernel: 1.0))
    (product,) = [item for item in items if item.sort == "product"]
    seconds = {"v5e": 2 * 4096**3 / (0.95 * 197e12), "v5p": 0.93 * cycles / 1.75e9, "v6e": 2 * 4096**3 / (0.9 * 918e12)}
    assert product.seconds == pytest.approx(seconds[chip])
    (copy,) = [item for item in items if item.sort == "memory"]
    assert copy.kind == hlo_cost.HOST and copy.bytes == 2 * 4096**2


SLICES = """HloModule jit_step, is_scheduled=true

ENTRY %main (all: bf16[80,512,128], x: bf16[1,512,128], i: s32[]) -> bf16[1,512,128] {
  %all = bf16[80,512,128]{2,1,0:S(5)} parameter(0)
  %x = bf16[1,512,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %to = ((bf16[80,512,128]{2,1,0:S(5)}, bf16[1,512,128]{2,1,0}, s32[]), bf16[80,512,128]{2,1,0:S(5)}, u32[]) dynamic-update-slice-start(%all, %x, %i)
  %there = bf16[80,512,128]{2,1,0:S(5)} dynamic-update-slice-done(%to)
  %from = ((bf16[80,512,128]{2,1,0:S(5)}, s32[]), bf16[1,512,128]{2,1,0}, u32[]) dynamic-slice-start(%there, %i)
  ROOT %back = bf16[1,512,128]{2,1,0} dynamic-slice-done(%from)
}
"""  # noqa: E501


def test_what_goes_to_the_host_and_back_is_a_layer_and_not_the_stack_of_all_layers():
    items = hlo_cost.items(hlo.parse(SLICES), Machine(CHIPS["v6e"], 4, lambda kernel: 1.0))
    assert [(item.name, item.kind, item.bytes) for item in items] == [
        ("to", hlo_cost.HOST, 2 * 512 * 128),
        ("from", hlo_cost.HOST, 2 * 512 * 128),
    ]


def test_published_decoders_have_their_sizes_and_flops(calibrate):
    models = importlib.import_module("language_model")
    billions = {"llama3-8b": 8.03, "llama3-70b": 70.6, "llama3-405b": 405.9, "gpt3-175b": 174.6, "qwen3-8b": 8.19}
    for name, count in billions.items():
        model = models.DECODERS[name]
        embedding = model.vocab * model.width
        assert (model.multiplied + embedding * (name != "gpt3-175b")) / 1e9 == pytest.approx(count, rel=0.005)
    small = dataclasses.replace(
        models.DECODERS["llama3-8b"], layers=2, width=256, heads=4, kv_heads=2, mlp=512, vocab=512
    )
    shape = lambda axes: jax.ShapeDtypeStruct(tuple(size for _, size in axes), jnp.float32)  # noqa: E731
    params = {"layers": {}}
    for path, axes in small.shapes.items():
        group, _, name = path.rpartition("/")
        (params[group] if group else params)[name] = shape(axes)
    tokens = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    for remat in models.REMAT:
        loss = lambda p, t, remat=remat: models.next_token_loss(small, p, t, remat)  # noqa: E731
        counts = flops.count(jax.make_jaxpr(jax.grad(loss))(params, tokens))
        assert flops.model_flops(counts) == pytest.approx(small.model_flops(2 * 128, 128), rel=0.01)


PROJECTION = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[16,2048,4096,1], w: bf16[32,128,4096,1]) -> bf16[16,2048,32,128] {
  %x = bf16[16,2048,4096,1]{2,1,0,3} parameter(0)
  %w = bf16[32,128,4096,1]{2,1,3,0} parameter(1)
  ROOT %y = bf16[16,2048,32,128]{3,1,0,2} convolution(%x, %w), window={size=32x1 pad=31_31x0_0 rhs_reversal=1x0}, dim_labels=1bf0_0oi1->1b0f
}
"""  # noqa: E501


def test_padding_belongs_to_the_axis_of_its_number_and_not_of_its_place():
    module = hlo.parse(PROJECTION)
    assert hlo.product_flops(module, module.computations[module.entry]) == 2 * 16 * 2048 * 4096 * 32 * 128


IN_PLACE = """HloModule jit_step, is_scheduled=true

%other_layout (p: pred[28,64,128]) -> pred[28,64,128] {
  %p = pred[28,64,128]{2,1,0} parameter(0)
  ROOT %c = pred[28,64,128]{2,1,0} copy(%p)
}

%update (p0: pred[28,64,128], p1: pred[1,64,128], p2: s32[]) -> pred[28,64,128] {
  %p0 = pred[28,64,128]{2,1,0} parameter(0)
  %p1 = pred[1,64,128]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %same = pred[28,64,128]{2,1,0} fusion(%p0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%other_layout
  %zero = s32[] constant(0)
  ROOT %u = pred[28,64,128]{2,1,0} dynamic-update-slice(%same, %p1, %p2, %zero, %zero)
}

ENTRY %main (all: pred[28,64,128], one: pred[1,64,128], i: s32[]) -> pred[28,64,128] {
  %all = pred[28,64,128]{2,1,0} parameter(0)
  %one = pred[1,64,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = pred[28,64,128]{2,1,0} fusion(%all, %one, %i), kind=kLoop, calls=%update
}
"""


def test_a_stack_that_is_updated_in_place_is_not_read_and_written_under_another_layout():
    module = hlo.parse(IN_PLACE)
    entry = module.computations[module.entry]
    assert hlo.traffic(module, entry, entry["y"]) == pytest.approx(2 * 64 * 128, abs=8)
