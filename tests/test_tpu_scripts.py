"""The scripts that run a job on TPU slices: clean, and printing every command they would run."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
COMMANDS = ("create", "setup", "launch", "logs", "stop", "resume", "teardown", "jobset")
VARIABLES = {"PROJECT": "mine", "ZONE": "us-east5-b", "BUCKET": "gs://mine", "REPOSITORY": "https://example.org/x.git"}


def run(script, *arguments, code=0, **variables):
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | VARIABLES | variables
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def commands(text):
    return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(SCRIPTS.glob("*.sh"))
    assert len(files) == 11
    result = subprocess.run([shellcheck, "-x", *map(str, files)], cwd=SCRIPTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_a_dry_run_needs_no_cloud_and_prints_commands_for_the_users_project(script):
    text = run(script, "--dry-run", PATH="/usr/bin:/bin")  # without gcloud and kubectl
    assert text
    if script != "jobset":
        pasted = "gcloud() { :; }; git() { :; }\n" + text  # what is printed can be pasted into a shell
        assert subprocess.run([shutil.which("bash"), "-euc", pasted], env={}, timeout=60).returncode == 0
        assert "--project=mine --zone=us-east5-b" in text or script == "resume"  # nothing to do while active
    assert "my-project" not in text and "my-bucket" not in text


def test_the_request_follows_from_generation_topology_and_slices():
    first, second = commands(run("create", "--dry-run", SPOT="0"))
    assert first[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "metacanvas"]
    assert "--accelerator-type=v5p-256" in first and "--node-id=metacanvas" in first and "--spot" not in first
    assert second[4] == "describe"
    text = run("create", "--dry-run", TPU="v6e", TOPOLOGY="16x16", SLICES="2")
    for word in ("--accelerator-type=v6e-256", "--node-count=2", "--node-prefix=metacanvas", "--spot"):
        assert word in text
    assert "v5litepod-16 " in run("create", "--dry-run", TPU="v5e", TOPOLOGY="4x4")
    assert "expected v4, v5e" in run("create", "--dry-run", TPU="v9", code=2)
    assert "jobset.sh" in run("create", "--dry-run", TPU="tpu7x", code=2)


def test_launch_starts_every_slice_with_the_flags_of_its_generation():
    text = run("launch", "--dry-run", SLICES="2", OVERRIDES="--config.train.steps=7")
    lines = text.splitlines()
    assert [line.split()[5] for line in lines] == ["metacanvas-0", "metacanvas-1"]
    for part in (
        "metacanvas train --config configs/video_stage3.py --workdir gs://mine/runs/stage3 --config.train.steps=7",
        "--processes 64",
        "tpu_scripts/flags.py v5p",
        "run_on_worker.sh",
        "RESTARTS=100",
    ):
        assert part in lines[0]
    assert "--processes 32 --profile 20:24 " in run("launch", "--dry-run", "--profile", "20:24")


def test_resume_asks_again_when_the_slices_were_taken_back():
    assert run("resume", "--dry-run") == "# metacanvas is ACTIVE: nothing to do\n"
    text = run("resume", "--dry-run", STATE="SUSPENDED")
    order = ["queued-resources delete", "queued-resources create", "tpu-vm scp", "run_on_worker.sh"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "queued-resources delete" not in run("resume", "--dry-run", STATE="ABSENT")


def test_the_jobset_restarts_on_preemption_alone_and_uses_a_public_image():
    lines = run("jobset", "--dry-run", SLICES="2", SERVICE_ACCOUNT="trainer").splitlines()
    assert lines[0] == "kubectl apply -f - <<'YAML'" and lines[-1] == "YAML"
    spec = yaml.safe_load("\n".join(lines[1:-1]))["spec"]
    rules = spec["failurePolicy"]["rules"]
    assert rules == [{"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (job,) = spec["replicatedJobs"]
    assert job["replicas"] == 2
    job = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 32
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75, 134]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert pod["serviceAccountName"] == "trainer"
    (container,) = pod["containers"]
    assert container["image"] == "python:3.11"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "--processes 64" in container["args"][0]
    plain = run("jobset", "--dry-run", SPOT="0")
    assert "gke-spot" not in plain
    assert "set REPOSITORY" in run("jobset", "--dry-run", REPOSITORY="", code=2)


@pytest.mark.parametrize(
    ("codes", "expected", "starts"), [((75, 75, 0), 0, 3), ((75, 2), 2, 2), ((75, 134, 0), 0, 3), ((75,) * 9, 75, 4)]
)
def test_the_worker_starts_again_on_exit_codes_75_and_134_only(tmp_path, codes, expected, starts):
    (tmp_path / "codes").write_text("\n".join(map(str, codes)))
    script = 'echo >>started; code=$(sed -n "$(wc -l <started)p" codes); exit "$code"'
    environment = {"PATH": os.environ["PATH"], "RESTARTS": "3", "RESTART_WAIT": "0"}
    command = ["bash", str(SCRIPTS / "run_on_worker.sh"), "bash", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert result.returncode == expected
    assert len((tmp_path / "started").read_text().splitlines()) == starts


def test_flags_of_every_generation_are_printed_for_libtpu():
    for generation in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        command = [sys.executable, str(SCRIPTS / "flags.py"), generation]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
        flags = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.split()
        assert "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000" in flags
        assert all(flag.startswith("--xla_") and "=" in flag for flag in flags)
