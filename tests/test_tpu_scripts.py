"""The scripts that run a job on TPU slices: clean, printing every command they would run, doing nothing by mistake."""

import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cloud_support import BARE, SCRIPTS, script

COMMANDS = ("create", "setup", "launch", "logs", "status", "stop", "resume", "teardown", "jobset")
REVISION = "0123456789" * 4


def run(name, *arguments, code=0, **variables):
    return script(name, *arguments, code=code, environment=BARE | {"REVISION": REVISION}, **variables)


def commands(text):
    return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(SCRIPTS.glob("*.sh"))
    assert len(files) == 12
    result = subprocess.run([shellcheck, "-x", *map(str, files)], cwd=SCRIPTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_needs_no_cloud_and_prints_commands_for_the_users_project(name):
    text = run(name, "--dry-run")  # gcloud and kubectl would fail
    assert text
    if name != "jobset":
        pasted = "gcloud() { :; }; git() { :; }\n" + text  # what is printed can be pasted into a shell
        assert subprocess.run([shutil.which("bash"), "-euc", pasted], env={}, timeout=60).returncode == 0
        assert "--project=mine --zone=us-east5-b" in text or name == "resume"  # nothing to do while active
    assert "my-project" not in text and "my-bucket" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_script_does_not_know_is_refused_before_anything_is_done(name, tmp_path):
    (tmp_path / "gcloud").write_text("#!/bin/sh\ntouch called\n")
    (tmp_path / "gcloud").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CHECKED": "0"}
    for word in ("--dryrun", "now"):
        assert f"unknown argument '{word}'" in run(name, word, "--yes", code=2, **variables)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("name", ["create", "teardown", "resume", "jobset"])
def test_machines_are_named_and_nothing_is_done_unless_the_user_agrees(name):
    said = run(name, code=2, SLICES="2")
    assert "2 slices of v5p-256 (4x4x8)" in said and "--yes agrees" in said
    if name != "jobset":
        assert "in us-east5-b (mine)" in said


def test_memory_and_disk_of_the_hosts_and_the_zones_are_said_before_machines_are_asked_for():
    said = run("create", code=2, TPU="v6e", TOPOLOGY="4x4", ZONE="us-east5-c")
    assert "hosts of a slice: 4 (ct6e-standard-4t), each with 720 GB of memory and a boot disk of 100 GB" in said
    assert "zones that offered v6e when this was written: us-east5-a us-east5-b us-central1-b" in said
    assert "zones that offered" not in run("create", code=2, TPU="v6e", TOPOLOGY="4x4", ZONE="us-east5-b")


@pytest.mark.parametrize(("answer", "done"), [("n\n", False), ("\n", False), ("y\n", True)])
def test_a_user_is_asked(tmp_path, answer, done):
    (tmp_path / "gcloud").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\necho ACTIVE\n")
    (tmp_path / "gcloud").chmod(0o755)
    mine, theirs = pty.openpty()
    os.write(mine, answer.encode())
    environment = BARE | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    process = subprocess.run(
        ["bash", str(SCRIPTS / "teardown.sh")], env=environment, stdin=theirs, capture_output=True, timeout=60
    )
    os.close(mine), os.close(theirs)
    assert (process.returncode == 0, (tmp_path / "called").exists()) == (done, done)


def test_the_request_follows_from_generation_topology_and_slices():
    first, second = commands(run("create", "--dry-run", SPOT="0"))
    assert first[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "metacanvas"]
    assert "--accelerator-type=v5p-256" in first and "--node-id=metacanvas" in first and "--spot" not in first
    assert second[4] == "describe"
    text = run("create", "--dry-run", TPU="v6e", TOPOLOGY="16x16", SLICES="2")
    for word in ("--accelerator-type=v6e-256", "--node-count=2", "--node-prefix=metacanvas", "--spot"):
        assert word in text
    assert "v5litepod-16 " in run("create", "--dry-run", TPU="v5e", TOPOLOGY="4x4")
    assert "expected GENERATION:SIZE" in run("create", "--dry-run", TPU="v9", code=2)
    assert "set both" in run("create", "--dry-run", TOPOLOGY="", code=2)
    assert "v6e:3x3 is not offered" in run("create", "--dry-run", TPU="v6e", TOPOLOGY="3x3", code=2)
    assert "jobset.sh" in run("create", "--dry-run", TPU="tpu7x", TOPOLOGY="4x4x4", code=2)


@pytest.mark.parametrize(("name", "value"), [("NAME", "My Run"), ("RUN", "a b"), ("RUN", "../x"), ("CONFIG", "")])
def test_names_that_no_shell_or_cloud_would_take_are_refused(name, value):
    assert f"{name} is " in run("launch", "--dry-run", code=2, **{name: value})


def test_the_config_chooses_the_slice_and_brings_what_it_needs_there():
    variables = {"CONFIG": "configs/t2i_scratch.py:text", "RUN": "", "CHECKED": "0", "TPU": "", "TOPOLOGY": ""}
    planned = run("launch", "--dry-run", **variables)
    assert "--workdir gs://mine/runs/t2i_scratch/text" in planned and "tpu_scripts/flags.py v6e" in planned
    assert "--processes 4 " in planned and "mesh.whole" not in planned
    other = run("launch", "--dry-run", **variables | {"TPU": "v5e", "TOPOLOGY": "4x4", "OVERRIDES": "--config.seed=3"})
    assert r"\'--config.mesh.whole=()\' --config.train.accumulate=2" in other and "--config.seed=3" in other
    for wrong, message in (("--config.train.stepz=2", "stepz"), ("--profil 3", "unknown argument '--profil'")):
        assert message in run("launch", code=2, **variables | {"OVERRIDES": wrong})


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
    assert "--profile 20:24 --processes 32 " in run("launch", "--dry-run", "--profile", "20:24")


def test_resume_asks_again_when_the_slices_were_taken_back():
    assert run("resume", "--dry-run") == "# metacanvas is ACTIVE: nothing to do\n"
    text = run("resume", "--dry-run", STATE="SUSPENDED")
    order = ["queued-resources delete", "queued-resources create", "tpu-vm scp", "run_on_worker.sh"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "queued-resources delete" not in run("resume", "--dry-run", STATE="ABSENT")


@pytest.mark.parametrize("said", ["a running\nb lost", "a running\nb no run", "a ended 75\nb ended 75", "a ended 137"])
def test_resume_starts_the_run_where_a_host_lost_it(said):
    assert "run_on_worker.sh" in run("resume", "--dry-run", HOSTS_SAY=said)


def test_resume_ends_with_the_run():
    assert "error: stage3 ended with code 2" in run("resume", "--dry-run", HOSTS_SAY="a ended 2\nb ended 2", code=2)
    for said in ("a ended 0\nb ended 0", "a ended stopped"):
        assert run("resume", "--dry-run", HOSTS_SAY=said) == ""
    assert "nothing to do" in run("resume", "--dry-run", HOSTS_SAY="a ended 0\nb running")


def manifest(**variables):
    lines = run("jobset", "--dry-run", **variables).splitlines()
    assert lines[0] == "kubectl apply -f - <<'YAML'" and lines[-1] == "YAML"
    return yaml.safe_load("\n".join(lines[1:-1]))["spec"]


def test_the_jobset_restarts_on_preemption_alone_and_uses_a_public_image():
    spec = manifest(SLICES="2", SERVICE_ACCOUNT="trainer")
    again, stop = spec["failurePolicy"]["rules"]
    assert again == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert stop == {"action": "FailJobSet", "onJobFailureReasons": ["BackoffLimitExceeded"]}
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
    text = container["args"][0]
    assert "--processes 64" in text and f"fetch --quiet --depth 1 https://example.org/x.git {REVISION}\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=60).returncode == 0
    plain = run("jobset", "--dry-run", SPOT="0")
    assert "gke-spot" not in plain and "gcsfuse" not in plain
    assert "set REPOSITORY" in run("jobset", "--dry-run", REPOSITORY="", code=2)
    assert "a branch moves" in run("jobset", "--dry-run", REVISION="main", code=2)


def test_the_jobset_mounts_the_bucket_where_it_is_asked_to():
    template = manifest(MOUNT="/mnt/bucket", CLUSTER="us-east5/mine", BUCKET="gs://mine/below")["replicatedJobs"][0]
    template = template["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = template["spec"]["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "mine" and attributes["hostNetworkPodKSA"] == "true"
    assert attributes["identityProvider"].endswith("/projects/mine/locations/us-east5/clusters/mine")
    (container,) = template["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/mnt/bucket"}]
    assert "MOUNT needs CLUSTER" in run("jobset", "--dry-run", MOUNT="/mnt/bucket", code=2)


def test_a_slice_of_one_host_takes_all_its_chips():
    small = {"TPU": "v6e", "TOPOLOGY": "2x4"}
    assert "--accelerator-type=v6e-8 " in run("create", "--dry-run", **small)
    assert "--processes 1 " in run("launch", "--dry-run", **small)
    job = manifest(**small)["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"google.com/tpu": 8}


@pytest.mark.parametrize(
    ("codes", "expected", "starts"), [((75, 75, 0), 0, 3), ((75, 2), 2, 2), ((75, 134, 0), 0, 3), ((75,) * 9, 75, 4)]
)
def test_the_worker_starts_again_on_exit_codes_75_and_134_only(tmp_path, codes, expected, starts):
    (tmp_path / "codes").write_text("\n".join(map(str, codes)))
    text = 'echo >>started; code=$(sed -n "$(wc -l <started)p" codes); exit "$code"'
    environment = {"PATH": os.environ["PATH"], "RESTARTS": "3", "RESTART_WAIT": "0", "CODE": "code"}
    command = ["bash", str(SCRIPTS / "run_on_worker.sh"), "bash", "-c", text]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert result.returncode == expected
    assert len((tmp_path / "started").read_text().splitlines()) == starts
    assert (tmp_path / "code").read_text() == f"{expected}\n"


def test_flags_of_every_generation_are_printed_for_libtpu():
    for generation in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        command = [sys.executable, str(SCRIPTS / "flags.py"), generation]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
        flags = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.split()
        assert "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000" in flags
        assert all(flag.startswith("--xla_") and "=" in flag for flag in flags)
