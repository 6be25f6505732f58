import base64
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from metacanvas_jax.cli.main import main
from metacanvas_jax.dit.sana.network import Sana, sana_1600m
from metacanvas_jax.dit.wan.network import Wan, wan2_2_ti2v_5b
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import CHIPS
from metacanvas_jax.kernels.cases import prologue
from metacanvas_jax.kernels.static_schedule import compiling_for
from metacanvas_jax.nn.stack import REMAT_CHOICES
from metacanvas_jax.parallel.flags import FLAGS, flags_for, libtpu_arguments
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, parse_mesh
from metacanvas_jax.plan import hlo, hlo_cost, parts, planning
from metacanvas_jax.plan.calibration import KINDS, Factors
from metacanvas_jax.plan.compile import compilation_key, does_not_fit
from metacanvas_jax.plan.hlo_cost import Machine
from metacanvas_jax.plan.report import Kernel, Part, Report, as_json, table
from metacanvas_jax.plan.search import Candidate, Outcome, candidates, ranked
from metacanvas_jax.plan.search import table as search_table
from metacanvas_jax.plan.topology import Slice, find_slice
from metacanvas_jax.train import flops
from metacanvas_jax.types import States

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [tpu] extra")

TEXT = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[64,128], p1: bf16[128,256]) -> bf16[64,256] {
  %p0 = bf16[64,128]{1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  ROOT %c = bf16[64,256]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dit.run/up/dot"}
}

%body (s: (s32[], bf16[64,128], bf16[32,256])) -> (s32[], bf16[64,128], bf16[32,256]) {
  %s = (s32[], bf16[64,128]{1,0}, bf16[32,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%s), index=1
  %w = bf16[32,256]{1,0} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %all = bf16[128,256]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %y = bf16[64,256]{1,0} fusion(%x, %all), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"3000"}
  ROOT %t = (s32[], bf16[64,128]{1,0}, bf16[32,256]{1,0}) tuple(%next, %x, %w)
}

%condition (s: (s32[], bf16[64,128], bf16[32,256])) -> pred[] {
  %s = (s32[], bf16[64,128]{1,0}, bf16[32,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[64,128], w: bf16[32,256]) -> f32[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %w = bf16[32,256]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,128]{1,0}, bf16[32,256]{1,0}) tuple(%zero, %a, %w)
  %loop = (s32[], bf16[64,128]{1,0}, bf16[32,256]{1,0}) while(%start), condition=%condition, body=%body
  %b = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
  %hop = bf16[64,128]{1,0} collective-permute-start(%b), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %f = f32[64,128]{1,0} convert(%b), metadata={op_name="jit(step)/optimizer/convert"}
  %there = bf16[64,128]{1,0} collective-permute-done(%hop)
  ROOT %k = f32[64,128]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/dit.run/attend/flash_bwd"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000000","transcendentals":"0","bytes_accessed":"10"}}}
}
"""  # noqa: E501


def costs_of(text, chip="v5p", per_slice=8):
    return hlo_cost.items(hlo.parse(text), Machine(CHIPS[chip], per_slice, lambda kernel: 0.5))


def test_loops_multiply_and_every_operation_is_reckoned():
    found = {item.name: item for item in costs_of(TEXT)}
    chip = CHIPS["v5p"]
    product, gather, hop, convert, kernel = (found[name] for name in ("y", "all", "hop", "f", "k"))
    assert product.count == 5  # 10 in steps of 2
    assert product.flops == 5 * 2 * 64 * 128 * 256
    assert parts.part_of(product.scope, product.sort) == "DiT matmul"  # named by what was fused
    assert gather.bytes == 5 * 3 * 32 * 256 * 2
    assert (gather.group, gather.overlap) == (4, "alone")
    assert gather.exposed == pytest.approx(gather.bytes / chip.ring)
    assert convert.bytes == 64 * 128 * (2 + 4)
    assert hop.overlap == "beside" and hop.seconds == pytest.approx(hop.bytes / chip.link)  # one, between two devices
    assert hop.exposed == pytest.approx(max(hop.seconds - convert.seconds, 0.0))
    assert kernel.flops == 1e6
    assert kernel.seconds == pytest.approx(1e6 / chip.flops / 0.5)
    assert parts.part_of(kernel.scope, kernel.sort) == "DiT attention"


def test_products_are_held_between_peak_and_traffic():
    chip = CHIPS["v5p"]
    slow, fast = (TEXT.replace('"3000"', f'"{cycles}"') for cycles in (10**9, 1))
    moved = 2 * (64 * 128 + 128 * 256 + 64 * 256)
    work = 2 * 64 * 128 * 256
    by_name = lambda text: {item.name: item.seconds / 5 for item in costs_of(text)}["y"]  # noqa: E731
    assert by_name(fast) == pytest.approx(max(work / chip.flops, moved / chip.hbm_bandwidth))
    assert by_name(slow) == pytest.approx(work / chip.flops / 0.6 + moved / 0.85 / chip.hbm_bandwidth)


def test_collectives_between_slices_go_over_the_network():
    gather = next(item for item in costs_of(TEXT, per_slice=2) if item.name == "all")
    assert gather.exposed == pytest.approx(gather.bytes / CHIPS["v5p"].network)


IN_FLIGHT = """HloModule jit_step, is_scheduled=true

%async_collective_fusion (p0: bf16[32,256], p1: bf16[128,256], p2: f32[64]) -> (f32[64], bf16[32,256], bf16[128,256]) {
  %p0 = bf16[32,256]{1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %all = bf16[128,256]{1,0} all-gather(%p0), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %negated = f32[64]{0} negate(%p2)
  ROOT %t = (f32[64]{0}, bf16[32,256]{1,0}, bf16[128,256]{1,0}) tuple(%negated, %p0, %all)
}

%done (p0: bf16[32,256], p1: bf16[128,256]) -> bf16[128,256] {
  %p0 = bf16[32,256]{1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  %all = bf16[128,256]{1,0} all-gather(%p0), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %arrived = bf16[128,256]{1,0} custom-call(%p0, %p1, %all), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[32,256], buffer: bf16[128,256], x: f32[64]) -> bf16[128,256] {
  %w = bf16[32,256]{1,0} parameter(0)
  %buffer = bf16[128,256]{1,0} parameter(1)
  %x = f32[64]{0} parameter(2)
  %y = (f32[64]{0}, bf16[32,256]{1,0}, bf16[128,256]{1,0}) fusion(%w, %buffer, %x), kind=kLoop, calls=%async_collective_fusion
  %part = bf16[32,256]{1,0} get-tuple-element(%y), index=1
  %whole = bf16[128,256]{1,0} get-tuple-element(%y), index=2
  ROOT %end = bf16[128,256]{1,0} fusion(%part, %whole), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_what_a_collective_carries_through_a_fusion_is_not_read_and_written_again():
    plain, gather = costs_of(IN_FLIGHT)
    assert (plain.name, plain.bytes) == ("y", 2 * 64 * 4)
    assert (gather.kind, gather.bytes) == ("all-gather", 3 * 32 * 256 * 2)
    assert gather.exposed == pytest.approx(gather.seconds - plain.seconds)


@pytest.mark.parametrize(
    ("text", "first", "count"),
    [
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3], 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], 4),
        ("replica_groups={{0,2},{1,3}}", [0, 2], 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [0, 4], 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [0, 1, 2, 3], 2),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2], 4),
    ],
)
def test_device_groups(text, first, count):
    op = hlo.Op("x", "all-gather", "f32[1]", (), "", f", {text}, dimensions=0", False)
    groups = hlo.device_groups(op)
    assert groups.shape[0] == count
    assert groups[0].tolist() == first


def test_convolutions_count_only_what_meets_the_picture():
    sides = {"inputs": 8, "kernel": 3, "outputs": 8, "stride": 1, "before": 1}
    assert flops.valid_positions(**sides, input_dilation=1, kernel_dilation=1) == 8 * 3 - 2
    jaxpr = jax.make_jaxpr(lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME"))(
        jnp.zeros((2, 3, 8, 8)), jnp.zeros((5, 3, 3, 3))
    )
    (found,) = flops.count(jaxpr)
    assert found.flops == 2 * 2 * 5 * 3 * 11**2  # 4 places of 3 taps, one of them outside


def test_counts_of_wan_at_full_size():
    config = wan2_2_ti2v_5b(remat="full", dtype="bfloat16")
    b, n, l = 1, 7 * 11 * 20, 64
    shape = jax.ShapeDtypeStruct
    inputs = (
        shape((b, 7, 22, 40, 48), jnp.float32),
        shape((b,), jnp.float32),
        States(shape((b, l, 4096), jnp.bfloat16)),
    )
    network = Wan(config)

    def gradient(params, *inputs):
        return jax.grad(lambda p: jnp.sum(network.apply(p, *inputs)))(params)

    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    counts = flops.count(jax.make_jaxpr(gradient)(variables, *inputs))
    d, mlp, layers = config.width, config.mlp, config.layers
    block = 2 * n * d * (6 * d + 2 * mlp) + 2 * l * d * 2 * d + 4 * n * n * d + 4 * n * l * d
    inside = 2 * n * 192 * d * 2 + 2 * l * (4096 * d + d * d) + 2 * (256 * d + d * d + d * 6 * d)
    recomputed = sum(c.flops for c in counts if c.is_recomputed)
    # The input of the network asks for no gradient; all else is forward once and backward twice.
    assert flops.model_flops(counts) == pytest.approx(3 * (layers * block + inside), rel=2e-3)
    assert recomputed == pytest.approx(layers * block, rel=0.02)


def test_counts_of_frozen_weights_have_no_weight_gradients():
    config = sana_1600m(dtype="bfloat16")
    network = Sana(config)
    b, l = 2, 32
    shape = jax.ShapeDtypeStruct
    latents, time = shape((b, 1, 16, 16, 32), jnp.float32), shape((b,), jnp.float32)
    context = shape((b, l, 2304), jnp.bfloat16)
    variables = jax.eval_shape(network.init, jax.random.key(0), latents, time, States(context))

    def of(argument):
        loss = lambda params, x: jnp.sum(network.apply(params, latents_of(x), time_of(x), States(x)))  # noqa: E731
        latents_of = lambda x: jnp.zeros(latents.shape, latents.dtype) + x.sum().astype(jnp.float32)  # noqa: E731
        time_of = lambda x: jnp.zeros(time.shape, time.dtype)  # noqa: E731
        return flops.count(jax.make_jaxpr(jax.grad(loss, argnums=argument))(variables, context))

    def products(counts, backward):
        return sum(c.flops for c in counts if c.is_backward == backward and "/q/" in c.scope and "dit" not in c.scope)

    trained, frozen = of(0), of(1)
    assert products(trained, False) == products(frozen, False) > 0
    assert products(trained, True) == 2 * products(trained, False)
    assert products(frozen, True) == products(frozen, False)


OUT_OF_MEMORY = (
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (55.71G) exceeds "
        "available HBM (15.75G).",
        "55.71 GiB of 15.75 GiB per device, 39.96 GiB too much",
    ),
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. Used 15.80G of 15.75G "
        "hbm. Exceeded hbm capacity by 58.85M.\n\n  Largest program allocations in hbm:\n\n  1. Size: 1.27G\n"
        '     Operator: op_name="jit(step)/dit.run/up"\n     Shape: bf16[8,27648,3072]{1,2,0:T(8,128)(2,1)}\n',
        r"largest buffers: 1.27G bf16\[8,27648,3072\] jit\(step\)/dit.run/up",
    ),
)


@pytest.mark.parametrize(("message", "expected"), OUT_OF_MEMORY)
def test_too_little_memory_is_one_line_with_the_arithmetic(message, expected):
    where = Slice("v5e:4x4", CHIPS["v5e"], 1, tuple(range(16)))
    error = does_not_fit(message, "train images", where)
    with pytest.raises(UserError, match=expected):
        raise error
    assert "\n" not in str(error)
    assert error.needed > error.available == pytest.approx(15.75 * 2**30)


def test_flags_follow_generation_and_compiler_and_have_reasons():
    assert all(flag.reason for flag in FLAGS)
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    old, new = flags_for("v5p", (0, 0, 42)), flags_for("v5p", (0, 0, 50))
    assert set(new) < set(old)
    assert "--xla_enable_async_all_gather=true" in libtpu_arguments("v5p", (0, 0, 42)).split()


def test_bad_slices_and_meshes_are_named():
    with pytest.raises(UserError, match="'v5p-128' is no name of a TPU slice; expected GENERATION:SIZE"):
        find_slice("v5p-128")
    with pytest.raises(UserError, match="expected AXIS=N"):
        parse_mesh("fsdp:4")
    assert parse_mesh("fsdp=4, tensor=2") == MeshConfig(data=1, fsdp=4, tensor=2)


@needs_libtpu
def test_a_slice_that_is_none_and_an_axis_that_does_not_divide():
    with pytest.raises(UserError, match="v5p has no slice of 3x3x3"):
        find_slice("v5p:3x3x3")
    where = find_slice("v5e:2x2")
    assert where.size == 4
    with pytest.raises(UserError, match=r"fsdp 3 x .* = 3 does not fit 4 devices"):
        make_mesh(MeshConfig(data=1, fsdp=3), where.devices)


def test_without_a_topology_the_recommended_hardware_of_the_config_is_planned(monkeypatch, capsys):
    def asked(name):
        raise UserError(f"asked for {name}")

    monkeypatch.setattr(planning, "find_slice", asked)
    assert main(["plan", "--config", "configs/video_stage3.py"]) == 2
    assert "asked for v5p:4x4x8" in capsys.readouterr().err
    assert main(["plan", "--config", "configs/video_stage3.py:miniature"]) == 2
    assert "names no hardware: give a slice with --topology" in capsys.readouterr().err


MINIATURE = ("plan", "--config", "configs/miniature.py:canvas", "--topology", "v5e:2x2", "--mesh", "data=2,fsdp=2")


@needs_libtpu
def test_the_miniature_is_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METACANVAS_PLAN_CACHE", str(tmp_path / "cache"))
    assert main([*MINIATURE, "--out", str(tmp_path)]) == 0
    assert "PASS" in capsys.readouterr().out
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    (report,) = json.loads((tmp_path / "plan.json").read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    names = {part["name"] for part in report["parts"]}
    assert {"DiT matmul", "DiT attention", "MLLM prefix", "canvas write", "canvas connector", "optimizer"} <= names
    assert 0.98 < report["flops_ratio"] < 1.02
    memory = report["memory"]
    assert memory["optimizer"] == pytest.approx(2 * memory["trainable"], rel=1e-3)
    assert sum(memory.values()) == pytest.approx(report["needed"])
    assert 0 < report["mfu"] < 1
    assert report["canvas_flops_share"] > 0
    kernels = {(kernel["name"], kernel["part"]) for kernel in report["kernels"]}
    assert {("linear_attention_forward", "DiT attention"), ("linear_attention_backward", "DiT attention")} <= kernels


@needs_libtpu
@pytest.mark.slow
def test_a_batch_too_large_fails_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METACANVAS_PLAN_CACHE", str(tmp_path))
    assert main([*MINIATURE, "--config.train.batch=800000"]) == 1
    assert "FAIL: train text_to_image 1x60x60 does not fit v5e:2x2: it needs" in capsys.readouterr().out


def attended(x):
    with jax.named_scope("attend"):
        return jnp.tanh(x)


def named_otherwise(x):
    with jax.named_scope("other"):
        return jnp.tanh(x)


@needs_libtpu
def test_a_compilation_is_known_by_its_scopes_and_not_by_who_asks():
    where = find_slice("v5e:2x2")

    def lowered(function):
        with compiling_for("v5e") as sharding:
            kernel, inputs = prologue(sharding, kernel=True, backward=False, tokens=256, heads=2)
            x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
            return jax.jit(lambda x, *rest: (function(x), kernel(*rest))).lower(x, *inputs)

    def from_elsewhere(function):
        return lowered(function)

    (body,) = re.findall(r"body\\22: \\22([A-Za-z0-9+/=]+)", lowered(attended).as_text())
    assert b"prologue" in base64.b64decode(body)
    assert b"jaxtyping" not in base64.b64decode(body), "the kernel says through what it was called"
    assert str(Path(__file__).parent.parent).encode() not in base64.b64decode(body), "the kernel says where it lies"

    known = compilation_key(lowered(attended), where, {})
    assert compilation_key(from_elsewhere(attended), where, {}) == known
    assert compilation_key(lowered(named_otherwise), where, {}) != known
    assert compilation_key(lowered(attended), find_slice("v5e:4x4"), {}) != known


def outcome(seconds, *, collectives=0.0, passed=True, batch=16):
    part = Part("DiT matmul", 1e12, 1e12, 1e12, seconds - collectives, 0.0, 0.0, collectives)
    report = Report(
        config="c", program="p", topology="v5e:2x2", chip="v5e", devices=4, mesh={}, samples=batch, passed=passed,
        verdict="PASS" if passed else "FAIL: p does not fit", memory={}, needed=1.0, limit=2.0, parts=(part,),
        peak_flops=197e12,
    )  # fmt: skip
    return Outcome(Candidate(MeshConfig(), "full", batch), report, "")


def test_reports_survive_json_and_tell_what_latents_computed_ahead_would_save():
    report = outcome(3.0).report
    vae = Part("VAE", 9e14, 9e14, 9e14, 1.0, 0.0, 0.5, 0.0)
    kernel = Kernel("flash_attention_forward", "DiT attention", 30, 1e12, 0.5)
    report = dataclasses.replace(report, parts=(*report.parts, vae), kernels=(kernel,))
    tree = json.loads(as_json([report]))[0]
    assert Report.from_dict(tree) == report
    assert "flash_attention_forward       DiT attention             30     1.000    0.5000" in table(report)
    del tree["kernels"]  # as in a report of before
    assert Report.from_dict(tree) == dataclasses.replace(report, kernels=())
    assert (report.seconds, report.without("VAE").seconds) == (4.5, 3.0)
    assert report.mfu == pytest.approx((1e12 + 9e14) / (4 * 197e12 * 4.5))
    assert report.without("VAE").mfu == pytest.approx(1e12 / (4 * 197e12 * 3.0))


def test_search_ranks_by_time_per_sample_and_says_why_others_lose(monkeypatch):
    monkeypatch.setattr(Report, "factors", Factors(dict.fromkeys(KINDS, 1.0), 0.0, 0.1, "none"))
    slow, best = outcome(3.0, collectives=2.0), outcome(3.0, batch=32)
    found = ranked([slow, outcome(0.1, passed=False), best])
    assert [o.report for o in found[:2]] == [best.report, slow.report]
    assert found[0].reason == ""
    assert found[1].reason == "100% slower: exposed collectives cost 125.0 ms per sample more"
    assert found[2].reason == "p does not fit"
    assert "best" in search_table(found).splitlines()[1]


def test_candidates_cover_the_slice_plain_meshes_first():
    found = candidates(16, (8,), 2048, ("none", "full"))
    assert all(c.mesh.data * c.mesh.fsdp * c.mesh.context * c.mesh.tensor == 16 for c in found)
    assert (found[0].mesh, found[0].remat) == (MeshConfig(data=2, fsdp=8), "full")
    assert MeshConfig(data=1, fsdp=16) in [c.mesh for c in found[:10]]
    assert len(set(map(str, found))) == len(found)


def test_candidates_whose_gradients_are_reduce_scattered_go_first():
    found = candidates(16, (8,), 2240)  # SANA's: 16 rows of 140, 8 of 280, 4 of 560
    assert [c.mesh for c in found[:: len(REMAT_CHOICES)]][:2] == [MeshConfig(4, 4), MeshConfig(8, 2)]
