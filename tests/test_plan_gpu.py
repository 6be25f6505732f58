"""Plans for GPUs: names, the table of GPUs, the roofline, memory; and, where CUDA's compiler is, a compilation."""

import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from metacanvas_jax.cli.main import main
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import CHIPS, GIB, GPUS, TPUS, gpu_name
from metacanvas_jax.parallel.flags import flags_for
from metacanvas_jax.plan import gpu, gpu_cost, hlo, page
from metacanvas_jax.plan.gpu_cost import ATTENTION_SHARE, COPY_SHARE, PRODUCT_SHARE
from metacanvas_jax.plan.hlo_cost import Machine
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.report import Report, table
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import Slice, find_slice

H100 = CHIPS["h100"]
MINIATURE = ("plan", "--config", "configs/miniature.py:canvas", "--topology", "h100:1", "--mesh", "fsdp=1")

TEXT = """HloModule jit_step, is_scheduled=true

%gemm (p0: bf16[4096,8192], p1: bf16[8192,8192]) -> bf16[4096,8192] {
  %p0 = bf16[4096,8192]{1,0} parameter(0)
  %p1 = bf16[8192,8192]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4096,8192]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%chunks (s: (s32[], bf16[256,128])) -> (s32[], bf16[256,128]) {
  %s = (s32[], bf16[256,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %q = bf16[256,128]{1,0} get-tuple-element(%s), index=1
  %scores = f32[256,256]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}, \
metadata={op_name="jit(step)/dit/attend/while/body/dot_general"}
  %weights = f32[256,256]{1,0} exponential(%scores), metadata={op_name="jit(step)/dit/attend/while/body/exp"}
  ROOT %t = (s32[], bf16[256,128]{1,0}) tuple(%i, %q)
}

%condition (s: (s32[], bf16[256,128])) -> pred[] {
  %s = (s32[], bf16[256,128]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: bf16[4096,8192], w: bf16[8192,8192], q: bf16[256,128], f: f32[64,1024]) -> bf16[4096,8192] {
  %x = bf16[4096,8192]{1,0} parameter(0)
  %w = bf16[8192,8192]{1,0} parameter(1)
  %q = bf16[256,128]{1,0} parameter(2)
  %f = f32[64,1024]{1,0} parameter(3)
  %y = bf16[4096,8192]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, metadata={op_name="jit(step)/dit/up/dot"}
  %z = (bf16[4096,8192]{1,0}, s8[33554432]{0}) custom-call(%y, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/dit/down/dot"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %wide = (f32[64,64]{1,0}, s8[1024]{0}) custom-call(%f, %f), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/dit/time/dot"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %result = bf16[4096,8192]{1,0} get-tuple-element(%z), index=0
  %loop0 = s32[] constant(0)
  %start = (s32[], bf16[256,128]{1,0}) tuple(%loop0, %q)
  %loop = (s32[], bf16[256,128]{1,0}) while(%start), condition=%condition, body=%chunks, \
backend_config={"known_trip_count":{"n":"16"}}
  ROOT %sum = bf16[4096,8192]{1,0} add(%result, %y), metadata={op_name="jit(step)/dit/add"}
}
"""
CONVOLUTIONS = {  # kind: shapes of the operands and of the result, of 3 x 3 kernels on 16 x 16 places, 8 to 32 channels
    "Forward": ("bf16[2,16,16,8]", "bf16[8,3,3,32]", "bf16[2,16,16,32]"),
    "BackwardInput": ("bf16[2,16,16,32]", "bf16[8,3,3,32]", "bf16[2,16,16,8]"),
    "BackwardFilter": ("bf16[2,16,16,8]", "bf16[2,16,16,32]", "bf16[8,3,3,32]"),
}


def costs(text, chip=H100):
    found = gpu_cost.items(hlo.parse(text), Machine(chip, 1, lambda kernel: 1.0))
    return {item.name: item for item in found}


def test_the_table_has_what_the_compiler_and_the_roofline_need():
    assert {"h100", "h200", "a100-40", "a100-80", "l4", "rtx4090"} <= set(GPUS) and not set(GPUS) & set(TPUS)
    for chip in (CHIPS[name] for name in GPUS):
        assert min(chip.flops, chip.hbm, chip.hbm_bandwidth, *dataclasses.astuple(chip.gpu)[1:7]) > 0
        assert chip.gpu.capability >= (8, 0) and chip.clock == 0
        assert f'device_description_str: "{chip.kinds[0]}"' in gpu.target(chip)
    assert H100.ring == 450e9 and CHIPS["rtx4090"].ring == 0
    assert "cuda_compute_capability { major: 9 minor: 0 }" in gpu.target(H100)


def test_names_of_gpus():
    assert gpu_name("h100:8") == (H100, 8) and gpu_name("v5p:4x4x4") is None
    for name in ("h100:3", "h100", "h100:1x1", "h100:16"):
        with pytest.raises(
            UserError, match=rf"--topology '{name}': expected h100:N with N of 1, 2, 4, 8; examples are"
        ):
            gpu_name(name)
    with pytest.raises(UserError, match="expected rtx4090:N with N of 1, as it has no NVLink"):
        gpu_name("rtx4090:2")


@pytest.mark.parametrize("missing", ["jax_plugins", "nvidia"])
def test_without_the_packages_one_line_says_which_to_install(monkeypatch, capsys, missing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith(missing) else name)
    assert main([*MINIATURE]) == 2
    assert "compiling for a GPU needs" in (told := capsys.readouterr().err) and "metacanvas_jax[gpu-plan]" in told


def test_every_operation_takes_the_longer_time_of_products_and_bytes():
    found = costs(TEXT)
    flops, peak = 2 * 4096 * 8192 * 8192, PRODUCT_SHARE * 989e12
    for name in ("y", "z"):
        assert (found[name].sort, found[name].flops) == ("product", flops)
        assert found[name].seconds == pytest.approx(flops / peak)
    assert found["z"].bytes == 2 * (2 * 4096 * 8192 + 8192 * 8192), "the workspace of cuBLAS is not traffic"
    wide = found["wide"]
    assert wide.flops == 2 * 64 * 64 * 1024
    assert wide.seconds == pytest.approx(max(wide.flops / peak * 2, wide.bytes / (COPY_SHARE * 3.35e12)))
    added = found["sum"]
    assert added.sort == "memory" and added.bytes == 3 * 2 * 4096 * 8192
    assert added.seconds == pytest.approx(added.bytes / (COPY_SHARE * 3.35e12))


def test_chunks_of_attention_are_timed_as_cudnn_and_loops_by_their_known_count():
    kernel = costs(TEXT)[gpu_cost.ATTENTION]
    assert (kernel.sort, kernel.count, kernel.flops) == ("kernel", 16, 16 * 2 * 256 * 256 * 128)
    assert kernel.seconds == pytest.approx(kernel.flops / (ATTENTION_SHARE * 989e12))
    assert "weights" not in costs(TEXT), "cuDNN keeps the scores on the chip"
    assert "weights" in costs(TEXT.replace("attend/while", "mlp/while"))


def test_products_of_float32_have_half_the_peak():
    narrow, wide = (gpu_cost.roofline(H100, 1e15, 0.0, narrow=narrow) for narrow in (True, False))
    assert wide == 2 * narrow
    text = TEXT.replace("bf16[4096,8192]", "f32[4096,8192]").replace("bf16[8192,8192]", "f32[8192,8192]")
    assert costs(text)["y"].seconds == pytest.approx(2 * costs(TEXT)["y"].seconds)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_has_the_same_products_in_every_pass(kind):
    left, right, made = CONVOLUTIONS[kind]
    text = (
        f"HloModule m\n\nENTRY %main (a: {left}, b: {right}) -> {made} {{\n"
        f"  %a = {left}{{3,2,1,0}} parameter(0)\n  %b = {right}{{3,2,1,0}} parameter(1)\n"
        f"  ROOT %c = ({made}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, "
        f'dim_labels=b01f_i01o->b01f, custom_call_target="__cudnn$conv{kind}"\n}}\n'
    )
    assert costs(text)["c"].flops == 2 * (2 * 16 * 16 * 32) * (3 * 3 * 8)


class Canned:
    """A lowered program whose compilation is known."""

    def __init__(self, temporaries):
        self.temporaries = temporaries

    def as_text(self, debug_info=False):
        return f"program {self.temporaries}"

    def compile(self, compiler_options):
        assert compiler_options.keys() > flags_for("h100").keys() and set(compiler_options.values()) == {True}
        sizes = {"argument": 30 * GIB, "output": 10 * GIB, "alias": 9 * GIB, "temp": self.temporaries}
        stats = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        rest = dict.fromkeys(
            ("host_temp_size_in_bytes", "host_argument_size_in_bytes", "generated_code_size_in_bytes"), 0
        )
        memory = types.SimpleNamespace(**stats, **rest, peak_memory_in_bytes=1)
        return types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: TEXT)


def canned_report(monkeypatch, tmp_path, temporaries, unread=0.0):
    monkeypatch.setenv("METACANVAS_PLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "installed_plugin", lambda: "0.10.2")
    mesh = types.SimpleNamespace(shape={"fsdp": 1})
    program = Program("train", None, (), {"frozen": 20.0 * GIB + unread, "optimizer": 9.0 * GIB}, 16, mesh, ())
    traced = jax.jit(lambda x: x @ x).trace(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    object.__setattr__(program, "traced", traced)
    object.__setattr__(program, "lowered", Canned(temporaries))
    return study("a config", program, Slice("h100:1", H100, 1, (0,)))


def test_memory_is_arguments_outputs_and_temporaries_against_the_share_that_jax_is_given(monkeypatch, tmp_path):
    limit = 0.95 * 84942979072
    fits = canned_report(monkeypatch, tmp_path, 20 * GIB)
    assert fits.passed and fits.needed == (30 + 10 - 9 + 20) * GIB and fits.limit == limit
    assert fits.memory["activations"] == (51 - 29) * GIB
    again = canned_report(monkeypatch, tmp_path, 20 * GIB)
    assert dataclasses.replace(again, compile_seconds=fits.compile_seconds) == fits, "from the cache"
    more = canned_report(monkeypatch, tmp_path, 20 * GIB, unread=5.0 * GIB)  # 34 of which the program reads 30
    assert more.needed == (34 + 10 - 9 + 20) * GIB and more.memory["activations"] == (55 - 34) * GIB
    large = canned_report(monkeypatch, tmp_path, 60 * GIB)
    assert not large.passed and large.needed == 91 * GIB
    assert large.verdict == (
        f"FAIL: train does not fit h100:1: it needs 91.00 GiB of {limit / GIB:.2f} GiB per device, "
        f"{91 - limit / GIB:.2f} GiB too much"
    )


def test_a_report_for_gpus_says_what_is_assumed_and_one_for_tpus_does_not(monkeypatch, tmp_path):
    report = canned_report(monkeypatch, tmp_path, 20 * GIB)
    assert "memory of a GPU, GiB" in (text := table(report)) and "cuDNN attention" in text
    for words in ("69% of the data sheet's peak", "cuDNN cannot be asked", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"):
        assert words in text and words in page.html([report]).replace("&#x27;", "'")
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report and again.assumptions == report.assumptions
    tpu = dataclasses.replace(report, chip="v5p")
    assert "cuDNN cannot" not in table(tpu) and "HBM per device, GiB" in table(tpu)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the [gpu-plan] extra")
@pytest.mark.parametrize("topology", ["h100:1", "a100-80:8", "rtx4090:1"])
def test_the_miniature_is_compiled_for_gpus(tmp_path, capsys, monkeypatch, topology):
    monkeypatch.setenv("METACANVAS_PLAN_CACHE", str(tmp_path / "cache"))
    command = [*MINIATURE, "--out", str(tmp_path)]
    command[command.index("h100:1")] = topology
    command[command.index("fsdp=1")] = f"fsdp={topology.rpartition(':')[2]}"
    assert main(command) == 0
    assert "PASS" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "plan.json").read_text())
    assert {part["name"] for part in report["parts"]} >= {"DiT matmul", "MLLM prefix", "canvas write", "optimizer"}
    assert 0.8 < report["flops_ratio"] < 1.2
    assert report["memory"]["optimizer"] == pytest.approx(2 * report["memory"]["trainable"], rel=1e-3)
    assert 0 < report["mfu"] < 1 and report["needed"] < report["limit"]
    assert bool(report["collectives"]) == (report["devices"] > 1)
    assert {device.device_kind for device in find_slice(topology).devices} <= set(CHIPS[report["chip"]].kinds)
