"""The benchmark of whole training steps on a GPU: its script, its list of wheels, and its stages at tiny sizes."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_session.sh"

# In place of Python: runs no stage, but takes time for one that is "slow" and fails for one that is "bad".
STUB = """#!/usr/bin/env bash
while [ $# -gt 0 ]; do
  case $1 in
    --list) printf 'a.step\\nslow.step\\nbad.step\\nb.step\\n'; exit ;;
    --table) echo "a table"; exit ;;
    --run) name=$2 ;;
    --out) out=$2 ;;
  esac
  shift
done
echo "$name" >> "$out/ran"
[ "$name" != slow.step ] || sleep 20
[ "$name" != bad.step ] || { echo '{"failed": "no memory"}' > "$out/$name.json"; exit 1; }
echo '{"step_s": 1}' > "$out/$name.json"
"""


def session(out, place, *arguments, **environment):
    done = subprocess.run(
        [str(SCRIPT), str(out), str(place), *arguments],
        env=os.environ | {"PYTHON": sys.executable} | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    log = out / "session.log"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return done.stdout


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return {"PYTHON": path}


def ran(out):
    names = (out / "ran").read_text().split()
    (out / "ran").write_text("")
    return names


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_stage_that_is_stopped_or_fails_is_tried_again_and_no_other(tmp_path, stub):
    out = tmp_path / "out"
    assert session(out, tmp_path / "place", STAGE_SECONDS=1, **stub).endswith("a table\n")
    assert ran(out) == ["a.step", "slow.step", "bad.step", "b.step"]
    assert json.loads((out / "slow.step.json").read_text())["failed"].startswith("stopped after 1 s")
    session(out, tmp_path / "place", STAGE_SECONDS=1, **stub)
    assert ran(out) == ["slow.step", "bad.step"]
    assert (out / "table.md").read_text() == "a table\n"


def test_no_stage_begins_when_the_time_is_over(tmp_path, stub):
    out = tmp_path / "out"
    session(out, tmp_path / "place", STAGES="a.step slow.step b.step", STAGE_SECONDS=2, SESSION_SECONDS=2, **stub)
    assert ran(out) == ["a.step", "slow.step"]
    assert "the time is over before b.step" in (out / "session.log").read_text()


def test_the_wheels_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {*project["dependencies"], *extras["cuda"], *extras["torch"], *extras["miniature"]}
    lines = (BENCHMARKS / "gpu_wheels.txt").read_text().splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    assert not listed - known
    missing = known - listed - {line for line in known if line.startswith(("jax>=", "peft", "gguf"))}
    assert not missing, missing


def test_every_case_has_its_folders_before_its_stages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_full
    import gpu_full_cases

    assert set(gpu_full.CASES) == set(gpu_full_cases.CASES) and len(set(gpu_full.ORDER)) == len(gpu_full.ORDER)
    for case in gpu_full.CASES:
        stages = [name.split(".")[1] for name in gpu_full.ORDER if name.startswith(f"{case}.")]
        assert stages[0] == "folders" and stages.index("step") < stages.index("torch_step")


def test_a_table_has_no_ratio_of_different_jobs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_full

    ours = {"step_s": 0.1, "trained": 7, "flops": 98.9e12, "peak_flops": 989e12, "peak_GiB": 40.0, "first_step_s": 30}
    theirs = {"step_s": 0.15, "trained": 7, "peak_GiB": 50.0, "first_step_s": 40}
    files = {"t2i_lora.step": ours, "t2i_lora.torch_step": theirs, "t2i_lora.dit": ours, "t2i_lora.folders": {}}
    files["t2i_lora.torch_dit"] = theirs | {"trained": 8}
    for name, row in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name} | row))
    lines = gpu_full.table(tmp_path).splitlines()
    step = next(line for line in lines if "whole step" in line)
    assert step == "| t2i_lora, whole step | 100.0 | 150.0 | 1.50 x | 100.0% | 40.0 | 50.0 | 30 | 40 |"
    assert any("NOT THE SAME JOB" in line for line in lines) and not any("DiT alone" in line for line in lines)


def test_a_measurement_stands_beside_its_plan_where_both_are_of_the_same_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_full

    plan = {"chip": "h200", "topology": "h200:1", "devices": 1, "seconds": 0.5, "needed": 40 * 2**30, "tiny": False}
    ours = {"step_s": 0.6, "trained": 7, "flops": 1e15, "peak_GiB": 44.0, "first_step_s": 30, "tiny": False}
    gpu_full.keep(tmp_path, "t2i_lora.plan", plan | {"name": "t2i_lora.plan", "verdict": "PASS"})
    lines = gpu_full.table(tmp_path).splitlines()
    assert "| t2i_lora, whole step | h200:1 | 500.0 |  | 40.0 |  |" in lines, "nothing was measured"
    gpu_full.keep(tmp_path, "t2i_lora.step", ours | {"device": "NVIDIA H200"})
    assert "| t2i_lora, whole step | h200:1 | 500.0 | 1.20 x | 40.0 | 1.10 x |" in gpu_full.table(tmp_path)
    for other in ({"device": "NVIDIA H100 80GB HBM3"}, {"device": "NVIDIA H200", "tiny": True}):
        gpu_full.keep(tmp_path, "t2i_lora.step", ours | other)
        assert "| t2i_lora, whole step | h200:1 | 500.0 |  | 40.0 |  |" in gpu_full.table(tmp_path)
    failed = {"seconds": 0.0, "verdict": "FAIL: too large"}
    gpu_full.keep(tmp_path, "t2i_lora.plan", plan | {"name": "t2i_lora.plan"} | failed)
    assert "| t2i_lora, whole step | h200:1 | FAIL: too large |  | 40.0 |  |" in gpu_full.table(tmp_path)


def test_a_stage_writes_its_result_and_the_folders_that_the_others_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_full

    for name in ("HF_HUB_OFFLINE", "JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # a stage sets them; they are put back after the test
    place, results = tmp_path / "place", []
    for _ in range(2):
        assert gpu_full.run("t2i_lora.folders", tmp_path, place, True) == 0
        results.append(json.loads((tmp_path / "t2i_lora.folders.json").read_text()))
    assert results[0]["written_GB"] > 0 and results[1]["written_GB"] == 0, "what is there was written again"
    written = {str(file.parent.relative_to(place / "folders")) for file in place.rglob("config.json")}
    pipeline = {f"Sana_1600M_512px_diffusers/{part}" for part in ("text_encoder", "transformer", "vae")}
    assert written >= {"Qwen2.5-VL-7B-Instruct", "export_t2i_lora/connector", *pipeline}
    monkeypatch.setattr(gpu_full, "staged", lambda *arguments: 1 / 0)
    assert gpu_full.run("t2i_lora.folders", tmp_path, place, True) == 1
    assert json.loads((tmp_path / "t2i_lora.folders.json").read_text())["failed"].startswith("ZeroDivisionError")


def test_the_script_runs_a_stage_at_tiny_sizes(tmp_path):
    table = session(tmp_path / "out", tmp_path / "place", "--tiny", STAGES="t2i_lora.folders", STAGE_SECONDS=900)
    assert "| t2i_lora.folders | written_GB" in table


@pytest.mark.torch
@pytest.mark.miniature
@pytest.mark.parametrize(
    "case",
    [
        "t2i_lora",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("t2i_scratch", "image_editing", "video_25_cross", "video_25")
        ),
    ],
)
def test_every_stage_passes_at_tiny_sizes_and_both_sides_train_the_same(tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_full

    stages, out = [name for name in gpu_full.ORDER if name.startswith(f"{case}.")], tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu_full.py"), "--tiny", "--run", *stages]
    command += ["--out", str(out), "--place", str(tmp_path / "place")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as there
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in stages}
    assert done.returncode == 0, {name: row["failed"] for name, row in found.items() if "failed" in row}
    assert not any("left_out" in row for row in found.values())
    table = gpu_full.table(out)
    assert f"| {case}, whole step |" in table and "NOT THE SAME" not in table
    if f"{case}.training" in found:
        assert found[f"{case}.training"]["resumed_equal"]
